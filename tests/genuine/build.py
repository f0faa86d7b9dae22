"""Directories of tiny weights in the form of genuine ones, from what `artefacts/` records.

Names, shapes and files come from there and from the lists below, never from the tables under test.
"""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

ARTEFACTS = Path(__file__).parent / "artefacts"
TINY = Path(__file__).parents[2] / "checkpoints" / "tiny" / "qwen2_5_vl"
Tensors = dict[str, np.ndarray]

# The template of Qwen2.5's tokenizer knows texts and tools: a picture is not a string.
TEXT_ONLY = (
    "{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
WITH_PICTURES = json.loads((TINY / "chat_template.json").read_text())["chat_template"]
TEMPLATES = {"<text only>": TEXT_ONLY, "<with pictures>": WITH_PICTURES}


def record(name: str) -> dict:
    """What is known of an artefact: `files`, `tensors` (name -> shape), `written_by`."""
    content = json.loads((ARTEFACTS / f"{name}.json").read_text())
    if isinstance(content["tensors"], str):
        content["tensors"] = record(content["tensors"])["tensors"]
    return content


def draw(shapes: Mapping[str, list[int]]) -> Tensors:
    """Values that depend on a tensor's name alone, and that bfloat16 holds exactly."""
    return {name: _draw(name, shape) for name, shape in shapes.items()}


def _draw(name: str, shape: list[int]) -> np.ndarray:
    # Hugging Face keeps the matrix of positions twice, or once under either name.
    seed = "positions" if name.endswith("positional_embedding") else name
    x = np.random.default_rng(zlib.crc32(seed.encode())).standard_normal(shape, np.float32)
    if len(shape) > 1:
        x *= 0.5 if "embed" in name or "token" in name else int(np.prod(shape[1:])) ** -0.5
    elif name.endswith(".weight"):
        x = 1 + np.float32(0.1) * x
    else:
        x *= np.float32(0.1)
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def write(
    name: str, directory: Path, tensors: Tensors | None = None, shards: int = 1, dtype=np.float32
) -> Path:
    """The artefact's directory; of its own tensors unless others are given."""
    directory.mkdir(parents=True)
    known = record(name)
    for file, content in known["files"].items():
        _write_file(directory / file, content)
    write_tensors(directory, draw(known["tensors"]) if tensors is None else tensors, shards, dtype)
    return directory


def _write_file(file: Path, content: dict | str | None) -> None:
    if content is None:
        model = json.loads((TINY / "tokenizer.json").read_text())["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        text = {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "tokenizer.json": (TINY / "tokenizer.json").read_text(encoding="utf-8"),
        }[file.name]
    elif isinstance(content, str):
        text = TEMPLATES[content]
    else:
        if content.get("chat_template") in TEMPLATES:
            content = content | {"chat_template": TEMPLATES[content["chat_template"]]}
        text = json.dumps(content, indent=2)
    file.write_text(text, encoding="utf-8")


def write_tensors(directory: Path, tensors: Tensors, shards: int = 1, dtype=np.float32) -> None:
    """model.safetensors, or numbered files of consecutive names with their index."""
    arrays = {name: np.ascontiguousarray(x.astype(dtype)) for name, x in tensors.items()}
    if shards == 1:
        save_file(arrays, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, names in enumerate(np.array_split(list(arrays), shards)):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {str(name): arrays[name] for name in names}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(x.nbytes for x in arrays.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def edit(file: Path, **changes) -> None:
    """Other values for keys of a JSON file; dots lead into sections, None takes a key away."""
    content = json.loads(file.read_text())
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = content
        for name in sections:
            section = section[name]
        if value is None:
            section.pop(key)
        else:
            section[key] = value
    file.write_text(json.dumps(content, indent=2))


def new_spelling(name: str) -> str:
    """A Qwen-VL's tensor as the module tree of transformers >= 4.52 calls it."""
    if name.startswith("visual."):
        return f"model.{name}"
    return re.sub(r"^model\.", "model.language_model.", name)


def context_shapes(width: int, queries: int, prompt: int) -> dict[str, list[int]]:
    """LENS's own tensors: queries, the connector's four blocks, convolution and projection."""
    shapes = {
        "learnable_query": [1, queries, width],
        "connector.pos_embed": [1, queries, width],
        "conv_1d.weight": [width, width, queries],
        "conv_1d.bias": [width],
        "proj_to_sam.0.weight": [width, width],
        "proj_to_sam.0.bias": [width],
        "proj_to_sam.2.weight": [prompt, width],
        "proj_to_sam.2.bias": [prompt],
    }
    for block in (f"connector.blocks.{i}" for i in range(4)):
        linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (out, into) in linears.items():
            shapes[f"{block}.{name}.weight"] = [out * width, into * width]
            shapes[f"{block}.{name}.bias"] = [out * width]
        for name in ("norm1", "norm2"):
            shapes |= {f"{block}.{name}.{kind}": [width] for kind in ("weight", "bias")}
    return shapes


# --- SAM ------------------------------------------------------------------------------------------

# Hugging Face's name -> Meta's, a regular expression each, all applied in this order.
_DECODER = (
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"((?:_mlps\.\d|_head|pointer_proj)\.)layers\.0", r"\1layers.1"),
    (r"((?:_mlps\.\d|_head|pointer_proj)\.)proj_in", r"\1layers.0"),
    (r"((?:_mlps\.\d|_head|pointer_proj)\.)proj_out", r"\1layers.2"),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"mlp\.proj_in", "mlp.layers.0"),
    (r"mlp\.proj_out", "mlp.layers.1"),
)
_SAM2 = (
    *_DECODER,
    (r"^(prompt_encoder|mask_decoder)\.", r"sam_\1."),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"\bo_proj\b", "out_proj"),
    (r"\blayer_norm", "norm"),
    (r"^no_memory_embedding", "no_mem_embed"),
    (r"^no_memory_positional_encoding", "no_mem_pos_enc"),
    (r"^no_object_pointer", "no_obj_ptr"),
    (r"^object_pointer_proj", "obj_ptr_proj"),
    (r"^occlusion_spatial_embedding_parameter", "no_obj_embed_spatial"),
    (r"^temporal_positional_encoding_projection_layer", "obj_ptr_tpos_proj"),
)
_SAM1 = (
    *_DECODER,
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.layer_norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.layer_norm2", "neck.3"),
    (r"\blayer_norm", "norm"),
    (r"\.point_embed\.", ".point_embeddings."),
)


# The memory of video, which a single picture never needs: names from Meta's files.
_NORMS = [f"memory_attention.layers.0.norm{i}" for i in (1, 2, 3)]
_LINEARS = [
    f"memory_attention.layers.0.{attention}.{name}_proj"
    for attention in ("self_attn", "cross_attn_image")
    for name in ("q", "k", "v", "out")
]
_MEMORY = [
    *_NORMS,
    *_LINEARS,
    "memory_attention.layers.0.linear1",
    "memory_attention.layers.0.linear2",
    "memory_attention.norm",
    *(f"memory_encoder.mask_downsampler.encoder.{i}" for i in (0, 1, 3, 4, 6, 7, 9, 10, 12)),
    "memory_encoder.pix_feat_proj",
    *(f"memory_encoder.fuser.layers.0.{name}" for name in ("dwconv", "norm", "pwconv1", "pwconv2")),
    "memory_encoder.out_proj",
]
MEMORY = [
    "maskmem_tpos_enc",
    "memory_encoder.fuser.layers.0.gamma",
    *(f"{name}.{kind}" for name in _MEMORY for kind in ("weight", "bias")),
]


def meta_tensors(name: str) -> Tensors:
    """The tensors of one of SAM's artefacts under Meta's names."""
    is_sam1 = name.startswith("sam1")
    encoder = "prompt_encoder" if is_sam1 else "sam_prompt_encoder"
    matrix = f"{encoder}.pe_layer.positional_encoding_gaussian_matrix"
    out: Tensors = {}
    for hf, x in draw(record(name)["tensors"]).items():
        if hf.endswith("positional_embedding"):
            out[matrix] = x
        elif hf.startswith("memory_"):
            continue
        elif hf == "prompt_encoder.point_embed.weight":
            out |= {f"{encoder}.point_embeddings.{i}.weight": x[i : i + 1] for i in range(len(x))}
        else:
            for pattern, replacement in _SAM1 if is_sam1 else _SAM2:
                hf = re.sub(pattern, replacement, hf)
            out[hf] = x
    return out if is_sam1 else out | {name: np.full(3, 7, np.float32) for name in MEMORY}
