"""Makes the golden folder text_only_qwen2: a tiny random Qwen2.5 and what the transformers library makes of it.

It needs torch and transformers, which nothing else here does, so it runs in an environment of its own:

    python3 -m venv /tmp/torch && /tmp/torch/bin/pip install torch transformers
    /tmp/torch/bin/python tests/golden/make_text_only_qwen2.py

The inputs are those of text_only_qwen3. golden.json says which versions made the folder that lies here.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

INPUTS = Path(__file__).parent / "text_only_qwen3"
FOLDER = Path(__file__).parent / "text_only_qwen2"
SEED = 4060  # of those tried, the one whose generations are the most diverse with all margins above 0.02
TEXTS = ("text0", "text1", "long")
GENERATIONS = {"gen": ("text0", 16), "gen_cross": ("gen_cross", 16), "gen_long": ("long", 8)}  # prompt, steps
Arrays = dict[str, torch.Tensor]
Model = Qwen2ForCausalLM


def make_model() -> Model:
    """Every parameter is random, biases and norms too, so that each has a part in the outputs."""
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(0.1 * noise)
    model.set_attn_implementation("eager")
    return model.eval()


@torch.no_grad()
def forward(model: Model, text: str, ids: torch.Tensor) -> Arrays:
    """Embeddings, the output of every layer, the final norm and the logits."""
    kept: Arrays = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, __, output, name=f"layer_{i}": kept.update(
                {name: output[0] if isinstance(output, tuple) else output}
            )
        )
        for i, layer in enumerate(model.model.layers)
    ]
    hooks.append(model.model.norm.register_forward_hook(lambda _, __, output: kept.update(final_norm=output)))
    kept["input_embeds"] = model.model.embed_tokens(ids)
    kept["logits"] = model(ids).logits
    for hook in hooks:
        hook.remove()
    return {f"{text}.{name}": value.clone() for name, value in kept.items()}


@torch.no_grad()
def generate(model: Model, prompt: torch.Tensor, steps: int) -> tuple[Arrays, dict[str, Any]]:
    """The likeliest tokens with a cache, whatever they are, and the logits of every step."""
    cache, ids, tokens, logits = None, prompt, [], []
    for _ in range(steps):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[:, -1])
        ids = out.logits[:, -1:].argmax(-1)
        tokens.append(ids)
    stacked, produced = torch.stack(logits, dim=1), torch.cat(tokens, dim=1)
    best = stacked.topk(2).values
    said = {
        "prompt_length": prompt.shape[1],
        "steps": steps,
        "min_top1_top2_margin": float((best[..., 0] - best[..., 1]).min()),
        "tokens": produced[0].tolist(),
    }
    return {"logits": stacked, "tokens": produced}, said


def loss(model: Model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids).loss


def gradients(model: Model, ids: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Norm and projection on cos(0.37 i) of the gradient of every tensor."""
    model.zero_grad()
    loss(model, ids).backward()
    numbers = {}
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.grad.double().ravel()
        projection = values @ torch.cos(0.37 * torch.arange(len(values), dtype=torch.float64))
        numbers[name] = float(values.norm()), float(projection)
    return numbers


def main() -> None:
    torch.set_num_threads(1)
    model = make_model()
    given = {name: ids for name, ids in load_file(INPUTS / "golden.safetensors").items() if name.endswith("input_ids")}
    arrays = {name: ids for name, ids in given.items() if not name.startswith("batch.")}
    inputs_info = json.loads((INPUTS / "golden.json").read_text())
    info: dict[str, Any] = {
        "case": FOLDER.name,
        "seed": SEED,
        "made_by": {
            "code": "tests/golden/make_text_only_qwen2.py",
            "class": "transformers.Qwen2ForCausalLM",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "texts": inputs_info["texts"],
        "loss": {},
    }
    double = make_model().double()
    noise = {}
    for text in TEXTS:
        ids = given[f"{text}.input_ids"]
        outputs = forward(model, text, ids)
        arrays |= outputs
        with torch.no_grad():
            info["loss"][text] = float(loss(model, ids))
            noise[text] = float((double(ids).logits - outputs[f"{text}.logits"]).abs().max())
    for name, (prompt, steps) in GENERATIONS.items():
        outputs, info[name] = generate(model, given[f"{prompt}.input_ids"], steps)
        arrays |= {f"{name}.{key}": value for key, value in outputs.items()}
    info["grad_text1"] = gradients(model, given["text1.input_ids"])
    info["noise"] = {"float64": noise}
    info["logits_std"] = float(arrays["long.logits"].std())

    model.save_pretrained(FOLDER)  # config.json and model.safetensors, as the library writes them
    (FOLDER / "generation_config.json").unlink()
    save_file({name: value.contiguous() for name, value in arrays.items()}, FOLDER / "golden.safetensors")
    (FOLDER / "golden.json").write_text(json.dumps(info, indent=1) + "\n")


if __name__ == "__main__":
    main()
