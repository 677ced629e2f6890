"""The training process: FSDP2 pretraining that starts, resumes and resizes without losing a bit."""
