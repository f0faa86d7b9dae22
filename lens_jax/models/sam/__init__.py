"""SAM 2, the image model: pictures and prompts in, masks out."""
