"""XLA flags of the tests, as the installed jaxlib knows them: an unknown one ends the process."""

from importlib.metadata import version


def flags(optimization: int) -> str:
    """Quick compilation: little optimization, and loops by older emitters where there are any."""
    text = f"--xla_backend_optimization_level={optimization}"
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        text += " --xla_cpu_use_fusion_emitters=false"
    return text
