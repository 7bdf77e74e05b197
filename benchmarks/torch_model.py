"""The model of `benchmarks.torch_step` in plain PyTorch, which takes its turns beside ours.

Runs in an environment of PyTorch's own, and imports nothing of this project:

    python3 -m venv torch-venv && torch-venv/bin/pip install torch==2.13.0 transformers

`benchmarks.torch_step` starts it with a folder of weights by our names and one batch, and writes to its input what to
run next: a line each, answered by a line of JSON with seconds and what was found.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Weights = Mapping[str, np.ndarray]


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def linear(weights: Weights, name: str, inputs: int) -> nn.Linear:
    """Of a kernel [*inputs, *outputs] with so many values in the inputs."""
    kernel = weights[f"{name}/kernel"].reshape(inputs, -1)
    bias = weights.get(f"{name}/bias")
    layer = nn.Linear(*kernel.shape, bias=bias is not None)
    layer.weight.data = tensor(kernel.T)
    if bias is not None:
        layer.bias.data = tensor(bias.reshape(-1))
    return layer


def layer_norm(weights: Weights, name: str, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(weights[f"{name}/scale"]), eps=eps)
    norm.weight.data, norm.bias.data = tensor(weights[f"{name}/scale"]), tensor(weights[f"{name}/bias"])
    return norm


def rms_norm(weights: Weights, name: str, eps: float = 1e-5) -> nn.RMSNorm:
    norm = nn.RMSNorm(len(weights[f"{name}/scale"]), eps=eps)
    norm.weight.data = tensor(weights[f"{name}/scale"])
    return norm


def layer_of(weights: Weights, prefix: str, number: int) -> Weights:
    """One layer's weights, by the rest of their names."""
    return {name[len(prefix) :]: x[number] for name, x in weights.items() if name.startswith(prefix)}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class VisionLayer(nn.Module):
    def __init__(self, weights: Weights, heads: int):
        super().__init__()
        width, self.heads = len(weights["ls1"]), heads
        self.norm1, self.norm2 = (layer_norm(weights, name, 1e-6) for name in ("norm1", "norm2"))
        self.qkv, self.proj = linear(weights, "qkv", width), linear(weights, "proj", width)
        self.fc1, self.fc2 = linear(weights, "fc1", width), linear(weights, "fc2", weights["fc2/kernel"].shape[0])
        self.ls1, self.ls2 = nn.Parameter(tensor(weights["ls1"])), nn.Parameter(tensor(weights["ls2"]))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sizes: list[int]) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        scales = (part.split(sizes, dim=1) for part in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        attend = functional.scaled_dot_product_attention
        out = [attend(*(part[None] for part in scale))[0] for scale in zip(*scales, strict=True)]
        x = x + self.ls1 * self.proj(torch.cat(out, dim=1).transpose(0, 1).reshape(len(x), -1))
        return x + self.ls2 * self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Expert(nn.Module):
    """The weights of one kind of token in a decoder layer."""

    def __init__(self, weights: Weights, kind: str, width: int):
        super().__init__()
        self.q, self.k, self.v = (linear(weights, f"qkv/{kind}/{name}", width) for name in "qkv")
        self.q_norm, self.k_norm = (rms_norm(weights, f"qkv/{kind}/{name}_norm") for name in "qk")
        self.out = linear(weights, f"out/{kind}", self.q.out_features)
        self.gate, self.up = (linear(weights, f"ffn/{kind}/{name}", width) for name in ("gate", "up"))
        self.down = linear(weights, f"ffn/{kind}/down", self.up.out_features)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (of(x).view(len(x), -1, self.q_norm.weight.numel()) for of in (self.q, self.k, self.v))
        return self.q_norm(q), self.k_norm(k), v

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nn.Module):
    def __init__(self, weights: Weights):
        super().__init__()
        self.attention_norm, self.ffn_norm = (rms_norm(weights, name) for name in ("attention_norm", "ffn_norm"))
        width = len(weights["attention_norm/scale"])
        self.visual, self.text = (Expert(weights, kind, width) for kind in ("visual", "text"))

    def forward(self, x: Tensor, before: int, after: int, cos: Tensor, sin: Tensor) -> Tensor:
        """Tokens in reading order; those from `before` to `after` are visual."""

        def experts(of_visual: Callable[[Tensor], Any], of_text: Callable[[Tensor], Any], x: Tensor) -> tuple:
            return of_visual(x[before:after]), of_text(torch.cat([x[:before], x[after:]]))

        def joined(visual: Tensor, text: Tensor) -> Tensor:
            return torch.cat([text[:before], visual, text[before:]])

        parts = zip(*experts(self.visual.heads, self.text.heads, self.attention_norm(x)), strict=True)
        q, k, v = (joined(*part).transpose(0, 1) for part in parts)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        out = out.transpose(0, 1).reshape(len(x), -1)
        x = x + joined(*experts(self.visual.out, self.text.out, out))
        return x + joined(*experts(self.visual.feed_forward, self.text.feed_forward, self.ffn_norm(x)))


class Model(nn.Module):
    """One sample: text, one image of some scales, text."""

    def __init__(self, weights: Weights, batch: Mapping[str, np.ndarray]):
        super().__init__()
        dim, width = weights["vision/patch_embed/kernel"].shape
        depth, _, _, vision_heads, _ = weights["vision/layers/qkv/kernel"].shape
        self.patch_embed = linear(weights, "vision/patch_embed", dim)
        self.vision = nn.ModuleList(
            VisionLayer(layer_of(weights, "vision/layers/", i), vision_heads) for i in range(depth)
        )
        self.connector = nn.Sequential(
            layer_norm(weights, "connector/norm", 1e-5),
            linear(weights, "connector/fc1", 4 * width),
            nn.GELU(),
            linear(weights, "connector/fc2", len(weights["connector/fc2/kernel"])),
        )
        self.embed = nn.Parameter(tensor(weights["decoder/embed/embedding"]))
        depth = len(weights["decoder/layers/attention_norm/scale"])
        self.decoder = nn.ModuleList(DecoderLayer(layer_of(weights, "decoder/layers/", i)) for i in range(depth))
        self.final_norm = rms_norm(weights, "decoder/final_norm")
        self.head = linear(weights, "decoder/head", self.embed.shape[1])
        self.batch = {name: tensor(array) for name, array in batch.items()}
        self.before, self.sizes = int(batch["before"]), batch["sizes"].tolist()

    def forward(self) -> Tensor:
        """The mean cross-entropy of the text tokens that have a target."""
        batch, before = self.batch, self.before
        x = self.patch_embed((batch["patches"].float() / 255 - 0.5) / 0.5)
        for layer in self.vision:
            x = layer(x, batch["vision_cos"], batch["vision_sin"], self.sizes)
        image = self.connector(x.view(len(x) // 4, -1))
        text, after = functional.embedding(batch["text"], self.embed), before + len(image)
        x = torch.cat([text[:before], image, text[before:]])
        for layer in self.decoder:
            x = layer(x, before, after, batch["cos"][None], batch["sin"][None])
        logits = self.head(self.final_norm(torch.cat([x[:before], x[after:]])))
        return functional.cross_entropy(logits, batch["targets"], ignore_index=-1)


def language_model(weights: Weights, shape: Mapping[str, Any]) -> nn.Module:
    """Transformers' Qwen3 with the text's weights."""
    import transformers

    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)).eval()
    found = {
        "model.embed_tokens.weight": weights["decoder/embed/embedding"],
        "model.norm.weight": weights["decoder/final_norm/scale"],
        "lm_head.weight": weights["decoder/head/kernel"].T,
    }
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    norms |= {f"self_attn.{name}_norm": f"qkv/text/{name}_norm" for name in "qk"}
    for i in range(shape["num_hidden_layers"]):
        layer, start = layer_of(weights, "decoder/layers/", i), f"model.layers.{i}."
        found |= {f"{start}{name}.weight": layer[f"{own}/scale"] for name, own in norms.items()}
        for name in ("gate", "up", "down"):
            found[f"{start}mlp.{name}_proj.weight"] = layer[f"ffn/text/{name}/kernel"].T
        for name in "qkv":
            kernel = layer[f"qkv/text/{name}/kernel"]
            found[f"{start}self_attn.{name}_proj.weight"] = kernel.reshape(len(kernel), -1).T
        out = layer["out/text/kernel"]
        found[f"{start}self_attn.o_proj.weight"] = out.reshape(-1, out.shape[-1]).T
    model.load_state_dict({name: tensor(array) for name, array in found.items()})
    return model


class Turns:
    """What can be run: each gives what was found, and is timed."""

    def __init__(self, folder: Path):
        weights, self.settings = (
            dict(np.load(folder / "weights.npz")),
            json.loads((folder / "settings.json").read_text()),
        )
        self.model = Model(weights, dict(np.load(folder / "batch.npz")))
        decayed, rest = [], []
        for parameter in self.model.parameters():
            (decayed if parameter.ndim > 1 else rest).append(parameter)
        self.clip = self.settings["optimizer"].pop("clip")
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, fused=True, **self.settings["optimizer"])
        try:
            self.language = language_model(weights, self.settings["language"])
        except ImportError:
            self.language = None

    def gradient(self) -> float:
        """Forward and backward."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model()
        loss.backward()
        return loss.item()

    def step(self) -> float:
        """A training step."""
        loss = self.gradient()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss

    def first(self) -> list[list[int]]:
        """The first token of an answer."""
        return self._answers(self.settings["prompts"][:1], 1)

    def answer(self) -> list[list[int]]:
        """An answer."""
        return self._answers(self.settings["prompts"][:1], self.settings["new_tokens"])

    def firsts(self) -> list[list[int]]:
        """The first tokens of all answers, in one batch."""
        return self._answers(self.settings["prompts"], 1)

    def answers(self) -> list[list[int]]:
        """All answers, in one batch."""
        return self._answers(self.settings["prompts"], self.settings["new_tokens"])

    def each(self) -> list[list[int]]:
        """All answers, one at a time."""
        return [self._answers([prompt], self.settings["new_tokens"])[0] for prompt in self.settings["prompts"]]

    @torch.inference_mode()
    def _answers(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        tokens, cache, found = torch.tensor(prompts), None, []
        for _ in range(count):
            out = self.language(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, tokens = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(tokens)
        return torch.cat(found, dim=1).tolist()


def main(folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    turns = Turns(folder)
    print(json.dumps({"torch": torch.__version__, "language": turns.language is not None}), flush=True)
    for line in sys.stdin:
        run = getattr(turns, line.strip())
        began = time.perf_counter()
        found = run()
        print(json.dumps({"seconds": time.perf_counter() - began, "found": found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
