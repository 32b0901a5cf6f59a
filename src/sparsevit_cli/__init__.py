"""Window-sparse Swin Transformers: adapt, search, finetune, profile and export (SparseViT, CVPR 2023)."""
