"""What the language model reads: questions, answers, tokens and their positions (LENS section 3)."""

SYSTEM = "You are a helpful assistant. "
QUESTION = "Output the bounding box of the {question} in the image."
REASONING_QUESTION = (
    'Locate "{question}", report the bbox coordinates in JSON format.'
    "Compare the difference between objects and find the most closely matched one."
    "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    "Output the one bbox inside the interested object in JSON format."
    "i.e., <think>thinking process here</think><answer>answer here</answer>"
)
