"""The same weights in Hugging Face's Mamba give the same logits and the same text."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from transformers import MambaConfig as TheirConfig
from transformers import MambaForCausalLM

from models.generation import generate
from models.heads import LanguageModel
from models.mamba import MambaConfig
from models.registry import LanguageTask, build_model

VOCABULARY = 61


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, MambaForCausalLM]:
    """Ours with every parameter moved off its starting value, and theirs with those weights."""
    torch.manual_seed(0)
    ours = build_model(
        MambaConfig(kind="mamba", n_layers=3, d_model=24, d_state=7, d_conv=3), LanguageTask(VOCABULARY), [7] * 3
    )
    assert isinstance(ours, LanguageModel)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for mixer in ours.mixers():
            mixer.get_parameter("out_proj.weight").mul_(30)  # else a token is followed by itself
    config = TheirConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        state_size=7,
        num_hidden_layers=3,
        conv_kernel=3,
        expand=2,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        # No token ends a text.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    theirs = MambaForCausalLM(config).eval()
    theirs.load_state_dict(
        {name.replace("embedding.", "embeddings."): part for name, part in ours.state_dict().items()}
    )
    return ours, theirs


@pytest.mark.parametrize("length", [1, 2, 3, 64, 133])
@torch.no_grad()
def test_logits_are_equal(pair: tuple[LanguageModel, MambaForCausalLM], backend: str, length: int) -> None:
    ours, theirs = pair
    tokens_BL = torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
    logits_BLV, expected_BLV = ours(tokens_BL), theirs(tokens_BL).logits
    assert float((logits_BLV - expected_BLV).norm() / expected_BLV.norm()) < 1e-5


@pytest.mark.parametrize("prompt", [[5], [1, 2], [7, 3, 60, 0, 12, 12, 9]])
def test_greedy_text_is_equal(pair: tuple[LanguageModel, MambaForCausalLM], prompt: list[int]) -> None:
    ours, theirs = pair
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, use_cache=True)
    tokens = list(islice(generate(ours, prompt, 0, None, torch.Generator()), 24))
    assert prompt + tokens == expected[0].tolist()
    assert len(set(tokens)) > 3, "a text that repeats one token would prove little"
