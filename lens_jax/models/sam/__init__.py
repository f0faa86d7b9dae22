"""SAM 1 and SAM 2, the image models: pictures and prompts in, masks out."""
