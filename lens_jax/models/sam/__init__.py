"""SAM 1 and SAM 2, the image models: from images and prompts to masks."""
