import pytest
import torch
from taught_transformers import PADDED, Encoder, compare, kept_tokens, sequences, spoilt, tagging_loss

pytestmark = pytest.mark.recipe


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tags", "numbers"])
def test_a_teacher_helps_where_labels_are_wrong(kind):
    errors = compare(kind)
    assert errors["taught"] < 0.5 * errors["alone"]
    assert errors["teacher"] < errors["taught"]


def test_padded_tokens_are_in_no_loss():
    tagged, _ = sequences(8, seed=1)
    tokens, padding, tags = tagged.tensors
    assert bool((tags[padding] == PADDED).all())
    assert bool((spoilt(tagged, seed=2).tensors[2][padding] == PADDED).all())
    answers = Encoder(8, 4).eval()(tokens, padding)
    changed = answers.masked_fill(padding.unsqueeze(2), 7.0)
    assert torch.equal(tagging_loss(answers, tags), tagging_loss(changed, tags))
    assert torch.equal(kept_tokens(answers, tagged.tensors), kept_tokens(changed, tagged.tensors))
    assert len(kept_tokens(answers, tagged.tensors)) == int((~padding).sum())
