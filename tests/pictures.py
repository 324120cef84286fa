"""Tiny random models that read pictures, with processors that need neither files nor torchvision."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny_lm import byte_tokenizer

PAD, IMAGE, START, STOP, OTHER = "<pad>", "<image>", "<start_of_image>", "<end_of_image>", "<video>"
SPECIAL = (PAD, IMAGE, START, STOP, OTHER, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
PIXELS, PATCH = 16, 4
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}MARK{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> Any:
    """One token a byte, and the marks of pictures."""
    made = byte_tokenizer()
    made.add_special_tokens({"pad_token": PAD, "additional_special_tokens": list(SPECIAL[1:])})
    for name, token in (("image", IMAGE), ("boi", START), ("eoi", STOP)):
        setattr(made, f"{name}_token", token)
        setattr(made, f"{name}_token_id", made.convert_tokens_to_ids(token))
    return made


IDS: dict[str, int] = {one: tokenizer().convert_tokens_to_ids(one) for one in SPECIAL}
TEXT: dict[str, Any] = {
    "vocab_size": 270, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 256,
    "pad_token_id": IDS[PAD],
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": PIXELS,
    "patch_size": PATCH,
}  # fmt: skip
SQUARE = {"height": PIXELS, "width": PIXELS}
QWEN = {
    "vision_start_token_id": IDS[START],
    "vision_end_token_id": IDS[STOP],
    "image_token_id": IDS[IMAGE],
    "video_token_id": IDS[OTHER],
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 32,
}  # fmt: skip
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


class Pictures(transformers.Qwen2_5_VLProcessor):
    """Qwen's processor without the one of videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        self.image_token, self.image_token_id = IMAGE, IDS[IMAGE]
        self.video_token, self.video_token_id = OTHER, IDS[OTHER]
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def llava() -> tuple[Any, Any]:
    images = CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE)
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(projection_dim=16, **TOWER),
        image_token_index=IDS[IMAGE],
    ), transformers.LlavaProcessor(
        images, tokenizer(), PATCH, "default", TEMPLATE.replace("MARK", IMAGE), IMAGE, 1
    )


def mistral3() -> tuple[Any, Any]:
    """Its processor needs torchvision; LLaVA's makes the same inputs, without marks at the ends of lines."""
    images = PixtralImageProcessorPil(size={"longest_edge": PIXELS}, patch_size={"height": 8, "width": 8})
    return transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT),
        vision_config=transformers.PixtralVisionConfig(head_dim=8, **TOWER),
        image_token_index=IDS[IMAGE],
        spatial_merge_size=2,
    ), transformers.LlavaProcessor(images, tokenizer(), 8, "full", TEMPLATE.replace("MARK", IMAGE), IMAGE)


def gemma3() -> tuple[Any, Any]:
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(
            **TEXT,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        ),
        vision_config=transformers.SiglipVisionConfig(vision_use_head=False, **TOWER),
        mm_tokens_per_image=4,
        image_token_index=IDS[IMAGE],
        boi_token_index=IDS[START],
        eoi_token_index=IDS[STOP],
    ), transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE), tokenizer(), TEMPLATE.replace("MARK", START), image_seq_length=4
    )


def idefics3(kind: str = "Idefics3") -> tuple[Any, Any]:
    """SmolVLM is the same model with another processor, which needs one for videos and torchvision for that."""
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": PIXELS}, max_image_size={"longest_edge": PIXELS}, do_image_splitting=False
    )
    return getattr(transformers, f"{kind}Config")(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=getattr(transformers, f"{kind}VisionConfig")(**TOWER),
        image_token_id=IDS[IMAGE],
        scale_factor=2,
        pad_token_id=IDS[PAD],
    ), transformers.Idefics3Processor(images, tokenizer(), 4, TEMPLATE.replace("MARK", IMAGE))


def qwen_processor() -> Any:
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, min_pixels=PIXELS**2, max_pixels=PIXELS**2
    )
    return Pictures(images, tokenizer(), TEMPLATE.replace("MARK", START + IMAGE + STOP))


def qwen2_5_vl() -> tuple[Any, Any]:
    return transformers.Qwen2_5_VLConfig(
        text_config=transformers.Qwen2_5_VLTextConfig(**TEXT, rope_parameters=SECTIONS),
        vision_config={**QWEN_TOWER, "fullatt_block_indexes": [1], "window_size": 16},
        **QWEN,
    ), qwen_processor()


def qwen3_vl() -> tuple[Any, Any]:
    return transformers.Qwen3VLConfig(
        text_config=transformers.Qwen3VLTextConfig(
            **TEXT, rope_parameters=SECTIONS | {"mrope_interleaved": True}
        ),
        vision_config={**QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **QWEN,
    ), qwen_processor()


BUILD: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava, "mistral3": mistral3, "gemma3": gemma3, "idefics3": idefics3, "smolvlm": lambda: idefics3("SmolVLM"),
    "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl,
}  # fmt: skip
"""A model's config and its processor, by family."""


def processor_of(family: str) -> Any:
    """Makes a family's inputs of texts and pictures."""
    return BUILD[family]()[1]


def model_of(family: str) -> Any:
    """A small random model of a family, in evaluation mode, whose weights are wide enough to make its pictures matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(BUILD[family]()[0], dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.generation_config.eos_token_id = None
    return model.eval()


def picture(seed: int) -> Image.Image:
    """A picture of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8))
