"""Towers small enough for tests, of open_clip and of transformers, a model trained on one, and a LLaVA."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from cache.format.tail import read_tail
from configs import UserError
from model.io.saved_model import save_final
from model.language.loading import quiet
from model.tail import load_tail
from model.vision.config import EncoderConfig
from model.vision.encoder import VisionEncoder, load_encoder
from model.vision.tail_blocks import make_tail
from model.vlm import VLM, build_vlm

WIDTH, DEPTH, HEADS, PATCH, SIDE = 64, 4, 2, 8, 32


def register(folder: Path) -> None:
    """Register `tiny-quickgelu` with open_clip, `tiny`, which computes exact GELU, and `tiny-siglip`."""
    vision = {"image_size": SIDE, "layers": DEPTH, "width": WIDTH, "patch_size": PATCH}
    vision["head_width"] = WIDTH // HEADS
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    for name, quick in (("tiny-quickgelu", True), ("tiny", False)):
        config = {"embed_dim": 32, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": text}
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
    vision = {"image_size": SIDE, "timm_model_name": "tiny_siglip"}
    vision |= {"timm_pool": "map", "timm_proj": "none"}
    path = folder / "tiny-siglip.json"
    path.write_text(json.dumps({"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)


@timm.models.register_model
def tiny_siglip(**given: Any) -> VisionTransformer:
    """Return timm's ViT as SigLIP has it: no CLS token, attention pooling, exact GELU."""
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH}
    unused = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    rest = {name: value for name, value in given.items() if name not in unused}
    fixed = {"num_heads": HEADS, "class_token": False, "global_pool": "map"}
    return VisionTransformer(**{**sizes, **fixed, **rest})


def entry(**overrides: Any) -> EncoderConfig:
    """Return an encoder entry with the tiny tower, in float32."""
    values: dict[str, Any] = {
        "name": "tiny-clip",
        "library": "open_clip",
        "model": "tiny-quickgelu",
        "activation": "quick_gelu",
        "blocks": (2,),
        "mean": (0.48, 0.46, 0.41),
        "std": (0.27, 0.26, 0.28),
        "pool_frame": 2,
        "batch_size": 3,
        "compute_dtype": "float32",
    }
    return EncoderConfig(**{**values, **overrides})


def hugging_face(seed: int = 0, activation: str = "quick_gelu", **sizes: int) -> CLIPVisionModel:
    """Return this architecture as transformers builds it, with random weights large enough to matter."""
    torch.manual_seed(seed)
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": DEPTH}
    tower |= {"num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH, **sizes}
    with torch.device("meta"):  # transformers' own initialisation is slow
        model = CLIPVisionModel(CLIPVisionConfig(hidden_act=activation, **tower)).eval()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            limit = 1.7 if "embedding" in name else 1.7 * parameter.shape[-1] ** -0.5
            parameter.uniform_(*((0.5, 1.5) if is_norm else (-limit, limit)))
    positions = model.get_buffer(next(n for n, _ in model.named_buffers() if "position_ids" in n))
    positions.copy_(torch.arange(positions.numel()))
    return model


TOWERS: dict[str, dict[str, Any]] = {
    "clip": {"class": "CLIPVision", "intermediate_size": 96},
    "siglip": {"class": "SiglipVision", "intermediate_size": 96},
    "dinov2": {"class": "Dinov2"},
    "dinov2-gated": {"class": "Dinov2", "use_swiglu_ffn": True},
    "dinov2-registers": {"class": "Dinov2WithRegisters", "num_register_tokens": 3},
    "dinov3": {"class": "DINOv3ViT", "intermediate_size": 96, "num_register_tokens": 2},
    "dinov3-gated": {
        "class": "DINOv3ViT",
        "intermediate_size": 96,
        "use_gated_mlp": True,
        "hidden_act": "silu",
    },
}
"""Towers of transformers: the start of their classes' names, and what differs from the common sizes."""


def transformers_tower(kind: str, seed: int = 0, **overrides: Any) -> Any:
    """Return one of `TOWERS`, in evaluation mode, with random weights of which none is 0 or 1."""
    given = dict(TOWERS[kind])
    name = given.pop("class")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    sizes |= {"image_size": SIDE, "patch_size": PATCH}
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**{**sizes, **given, **overrides})
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save_tower(folder: Path, model: Any, **images: Any) -> Path:
    """Write a model of transformers, and a preprocessor_config.json."""
    with quiet():
        model.save_pretrained(folder)
    values = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3}
    size = {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps({**values, **size, **images}))
    return folder


def llava(tower: Any, **values: Any) -> LlavaForConditionalGeneration:
    """Return a tiny LLaVA with a copy of a tower."""
    text = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = LlavaConfig(
        vision_config=copy.deepcopy(tower.config), text_config=text, image_token_index=39, **values
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model.eval()


def open_clip_checkpoint(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a checkpoint of the whole model under open_clip's names, text tower included."""
    torch.manual_seed(seed)
    return dict(open_clip.create_model("tiny-quickgelu").state_dict())


def noise(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Return random pixels, (count, side, side, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def refusal(config: EncoderConfig, weights: Path | None = None) -> str:
    """Return the one-line message with which an encoder is refused."""
    with pytest.raises(UserError) as caught:
        load_encoder(config, device="cpu", weights=str(weights) if weights else None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_weights(folder: Path, model: str = "tiny-quickgelu", seed: int = 3) -> Path:
    """Write a checkpoint of open_clip with random weights in which no tensor is 0 or 1 everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = {
            name: value + 0.1 * torch.randn(value.shape)
            for name, value in open_clip.create_model(model).state_dict().items()
            if value.is_floating_point()
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    return folder / "open_clip_model.safetensors"


def save_trained(
    folder: Path,
    eyes: VisionEncoder,
    connector: str = "linear",
    *,
    codec: str = "fp16",
    llm: str = "random:qwen3-tiny",
) -> VLM:
    """Write a model as train.run saves it, with weights with which images change the answers.

    Args:
        folder: of the run.
        eyes: its encoder.
        connector: `linear` or `mlp`.
        codec: of the space.
        llm: its language model.
    """
    spec = eyes.spec(codec)
    if eyes.config.tail:
        how = {name: eyes.load_info()[name] for name in ("random_weights", "weights")}
        tail, data = make_tail(eyes.config, spec, **how)
        spec = dataclasses.replace(spec, tail=tail)
    vlm, tokenizer = build_vlm(spec.seen.width, llm, connector, seed=6)
    if spec.tail is not None:
        (folder / "cache").mkdir(parents=True)
        (folder / "cache/tail.safetensors").write_bytes(data)
        arrays = read_tail(folder / "cache/tail.safetensors", folder, spec.tail, spec.width)
        vlm.tail = load_tail(spec, arrays)
    generator = torch.Generator().manual_seed(11)
    for p in vlm.parameters():
        p.data += (0.3 if p.dim() == 1 else 0.1) * torch.randn(p.shape, generator=generator)
    space = {"spec": spec.to_json(), "load": eyes.load_info()}
    meta = {"connector": connector, "llm": llm, "space": space, "stage": 1, "step": 3}
    save_final(folder / "stage1/final", vlm, tokenizer, meta)
    return vlm.eval()


# ---- a LLaVA of somebody else

TEMPLATES = {
    "vicuna": (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
        "{% endif %}{# Render all images first #}{% for content in message['content'] | selectattr('type', "
        "'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
        "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', "
        "'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
        "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
        "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 "
        "== 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
        "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
}
"""Chat templates as published, of LLaVA-1.5, Qwen2, Llama 3 and Mistral."""
CONTROLS = {
    "vicuna": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
}
"""Special tokens of each template's tokenizer, besides `<image>`."""
OTHERS = {"chatml": ("<|im_start|>",), "llama3": ("<|start_header_id|>", "<|end_header_id|>")}
WORDS = "a cat and a dog: what is this picture of? It shows one, two, three colours. Describe it, please!"


def stranger_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the marks of a template: byte-level, or as SentencePiece's are in Llama 2."""
    controls = CONTROLS[style]
    texts = [*controls.values(), *OTHERS.get(style, ()), "<image>"]
    if style in ("vicuna", "mistral"):
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", *alphabet] if alphabet else [],
        initial_alphabet=[] if alphabet else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS, WORDS.lower(), "ASSISTANT USER INST"] * 3, trainer)
    if alphabet:  # bytes are ordinary tokens
        state = json.loads(backend.to_str())
        state["added_tokens"] = []
        backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    if bos := controls.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **controls)


def write_llava(
    folder: Path,
    style: str = "vicuna",
    *,
    tower: str = "clip",
    llm: type[PretrainedConfig] = LlamaConfig,
    tied: bool = False,
    act: str = "gelu",
    layers: int | list[int] = -2,
    fit: str = "pad",
    seed: int = 0,
    **more: Any,
) -> LlavaForConditionalGeneration:
    """Write a LLaVA as its authors would: built and saved by transformers' own classes, random weights.

    Args:
        folder: to write.
        style: one of `TEMPLATES`.
        tower: `clip` or `siglip`.
        llm: class of the language model's config.
        tied: whether its output layer is the embedding.
        act: the projector's activation.
        layers: `vision_feature_layer`.
        fit: `pad`, `squash`, or `crop`.
        seed: of the weights.
        more: further values of LlavaConfig.
    """
    tokenizer = stranger_tokenizer(style)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    eyes = sizes | {
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "num_hidden_layers": 3,
    }
    vision = (
        CLIPVisionConfig(**eyes, hidden_act="quick_gelu")
        if tower == "clip"
        else SiglipVisionConfig(**eyes, hidden_act="gelu_pytorch_tanh", vision_use_head=False)
    )
    text = llm(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=-(-len(tokenizer) // 64) * 64 + 64,  # padded rows
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **({"sliding_window": None} if llm is MistralConfig else {}),
    )
    select = "default" if tower == "clip" else "full"
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        projector_hidden_act=act,
        vision_feature_layer=layers,
        vision_feature_select_strategy=select,
        tie_word_embeddings=tied,
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        for value in model.parameters():
            value.data += 0.1 * torch.randn(value.shape)
    model.save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    if fit == "crop":
        images: Any = CLIPImageProcessor(size={"shortest_edge": SIDE + 5}, crop_size=side)
    else:
        images = LlavaImageProcessor(
            do_pad=fit == "pad", size=side, crop_size=side, do_center_crop=False
        )
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=int(tower == "clip"),
        image_token="<image>",
        chat_template=TEMPLATES[style],
    ).save_pretrained(folder)
    return model


class LlamaCpp:
    """What llama.cpp computes from an mmproj file (clip_graph_llava), in float32.

    Args:
        path: of the file.
        cls_last: whether the class token is behind the patches, as in builds with issue 25814.
        tanh: whether the tower's GELU is the tanh form, as in llama.cpp; exact if not.
    """

    def __init__(self, path: Path, cls_last: bool = False, tanh: bool = False) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {one.name: torch.tensor(one.data) for one in reader.tensors}
        self.cls_last, self.approximate = cls_last, "tanh" if tanh else "none"

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of images: (B, 3, S, S) -> (B, N, D)."""
        keys, tensors = self.keys, self.tensors
        patch = keys["clip.vision.patch_size"]
        x = F.conv2d(
            pixels, tensors["v.patch_embd.weight"], tensors.get("v.patch_embd.bias"), patch
        )
        x = x.flatten(2).transpose(1, 2)
        if "v.class_embd" in tensors:
            first = tensors["v.class_embd"].expand(len(x), 1, -1)
            x = torch.cat([x, first] if self.cls_last else [first, x], dim=1)
        x = x + tensors["v.position_embd.weight"]
        if "v.pre_ln.weight" in tensors:
            x = self._norm("v.pre_ln", x)
        assert "v.post_ln.weight" not in tensors
        layers = keys["clip.vision.feature_layer"]
        assert layers == sorted(layers) and max(layers) == keys["clip.vision.block_count"]
        stack = []
        for number in range(keys["clip.vision.block_count"]):
            if number in layers:
                stack.append(x)
            x = self._block(f"v.blk.{number}", x)
        joined = torch.cat([*stack, x], dim=-1)
        if "v.class_embd" in tensors:
            joined = joined[:, 1:]
        hidden = F.gelu(self._linear("mm.0", joined))
        return self._linear("mm.2", hidden)

    def _block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        heads = self.keys["clip.vision.attention.head_count"]
        y = self._norm(f"{name}.ln1", x)
        q, k, v = (
            self._linear(f"{name}.attn_{one}", y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for one in "qkv"
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self._linear(f"{name}.attn_out", y)
        y = self._linear(f"{name}.ffn_up", self._norm(f"{name}.ln2", x))
        if self.keys["clip.use_gelu"]:
            y = F.gelu(y, approximate=self.approximate)
        else:
            y = y * (1.702 * y).sigmoid()
        return x + self._linear(f"{name}.ffn_down", y)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        eps = self.keys["clip.vision.attention.layer_norm_epsilon"]
        return F.layer_norm(
            x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps
        )
