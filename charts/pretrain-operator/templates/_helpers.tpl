{{/* Name of every object of the release. */}}
{{- define "pretrain-operator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "pretrain-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "pretrain-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is needed when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Class of the operator's pods: the release's own, one that is there already, or none. */}}
{{- define "pretrain-operator.priorityClassName" -}}
{{- if not .Values.priorityClass.create -}}
{{- .Values.priorityClassName -}}
{{- else if .Values.priorityClassName -}}
{{- fail "priorityClassName names a class that exists, and priorityClass.create makes one; set one of them" -}}
{{- else -}}
{{- default (include "pretrain-operator.fullname" .) .Values.priorityClass.name -}}
{{- end -}}
{{- end -}}

{{- define "pretrain-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* The operator's pods as a peer of a NetworkPolicy. */}}
{{- define "pretrain-operator.peer" -}}
namespaceSelector:
  matchLabels:
    kubernetes.io/metadata.name: {{ .Release.Namespace }}
podSelector:
  matchLabels: {{- include "pretrain-operator.selectorLabels" . | nindent 4 }}
{{- end -}}

{{- define "pretrain-operator.labels" -}}
{{ include "pretrain-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Full reference of an image: [registry/]repository(@digest | :tag). Takes (dict key, image, default tag). */}}
{{- define "pretrain-operator.image" -}}
{{- if hasSuffix "/" .image.registry -}}
{{- fail (printf "%s.registry ends with a slash, which is added; remove it" .key) -}}
{{- end -}}
{{- with .image.registry }}{{ . }}/{{ end -}}
{{- .image.repository -}}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ default .tag .image.tag }}{{ end -}}
{{- end -}}

{{/* The restricted Pod Security profile, for a pod and for its container. */}}
{{- define "pretrain-operator.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "pretrain-operator.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
