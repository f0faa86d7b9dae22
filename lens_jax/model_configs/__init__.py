"""Configuration files of Qwen-VL and SAM, in their several forms, read as the shapes of our models.

lens_config.json keeps these files as they came with the weights, so that an export gives them back.
Converter and checkpoints therefore read them alike; models know their dataclasses alone.
"""
