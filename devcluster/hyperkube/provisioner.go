// The volume provisioner: one folder of the machine per claim, the same on every node.
//
// Volumes are of type "local" and not "hostPath", because the kubelet applies a pod's fsGroup to
// local volumes only: a pod that runs as an ordinary user can then write to its claim. All nodes
// share the machine's file system, so every access mode is honest, ReadWriteMany included. Sizes
// are recorded but not enforced.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"
)

// folders provisions volumes as sub-folders of root.
type folders struct{ root string }

func (f folders) path(volume string) string { return filepath.Join(f.root, volume) }

// Provision makes the folder first: the kubelet refuses a local volume whose path is missing.
func (f folders) Provision(
	_ context.Context, options controller.ProvisionOptions,
) (*core.PersistentVolume, controller.ProvisioningState, error) {
	claim := options.PVC.Spec
	if mode := claim.VolumeMode; mode != nil && *mode == core.PersistentVolumeBlock {
		return nil, controller.ProvisioningFinished, fmt.Errorf("block volumes are not offered: use volumeMode Filesystem")
	}
	path := f.path(options.PVName)
	if err := os.MkdirAll(path, 0o770); err != nil {
		return nil, controller.ProvisioningFinished, err
	}
	return &core.PersistentVolume{
		ObjectMeta: meta.ObjectMeta{Name: options.PVName},
		Spec: core.PersistentVolumeSpec{
			Capacity:                      core.ResourceList{core.ResourceStorage: claim.Resources.Requests[core.ResourceStorage]},
			AccessModes:                   claim.AccessModes,
			PersistentVolumeReclaimPolicy: *options.StorageClass.ReclaimPolicy,
			MountOptions:                  options.StorageClass.MountOptions,
			PersistentVolumeSource: core.PersistentVolumeSource{
				Local: &core.LocalVolumeSource{Path: path},
			},
			NodeAffinity: anyNode(),
		},
	}, controller.ProvisioningFinished, nil
}

// Delete removes the folder of a volume whose reclaim policy is Delete.
func (f folders) Delete(_ context.Context, volume *core.PersistentVolume) error {
	return os.RemoveAll(f.path(volume.Name))
}

// anyNode matches all nodes, later ones too: local volumes must name their nodes in some way.
func anyNode() *core.VolumeNodeAffinity {
	return &core.VolumeNodeAffinity{Required: &core.NodeSelector{
		NodeSelectorTerms: []core.NodeSelectorTerm{{
			MatchExpressions: []core.NodeSelectorRequirement{
				{Key: core.LabelHostname, Operator: core.NodeSelectorOpExists},
			},
		}},
	}}
}

func runProvisioner() int {
	flags := flag.NewFlagSet("local-provisioner", flag.ExitOnError)
	kubeconfig := flags.String("kubeconfig", "", "file with the cluster's address and credentials")
	name := flags.String("name", "", "provisioner name, as in StorageClass.provisioner")
	root := flags.String("root", "", "folder that holds one sub-folder per volume")
	_ = flags.Parse(os.Args[1:]) // ExitOnError: never returns an error
	if err := provision(*kubeconfig, *name, *root); err != nil {
		fmt.Fprintln(os.Stderr, "local-provisioner:", err)
		return 1
	}
	return 0
}

func provision(kubeconfig, name, root string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	ctx := context.Background()
	loop := controller.NewProvisionController(
		ctx, client, name, folders{root}, controller.LeaderElection(false),
	)
	loop.Run(ctx)
	return nil
}
