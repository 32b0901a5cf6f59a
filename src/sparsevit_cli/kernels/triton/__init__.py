"""The Triton engine: kernels for GPUs (`code`), their launches (`engine`), and settings of launches (`tuning`)."""
