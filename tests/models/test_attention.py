import pytest
import torch

from tests import tiny
from tunesmith.models import quick_attention


def gradients(model, ids, mask):
    model.zero_grad()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=embeds, attention_mask=mask).logits.float()
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_bert, tiny.tiny_gpt2])
def test_outputs_are_the_same_bits_and_gradients_nearer_to_those_of_float32(make):
    model = make().eval()
    ids, mask = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    exact = gradients(model, ids, mask)[1]
    model = model.to(torch.bfloat16)
    plain, far = gradients(model, ids, mask)
    with quick_attention():
        out, near = gradients(model, ids, mask)
    assert torch.equal(out, plain) and not torch.equal(near, far)
    assert (near - exact).norm() <= 1.05 * (far - exact).norm()
    assert torch.equal(gradients(model, ids, mask)[1], far), "left as it was found"


def test_float32_is_left_alone():
    model = tiny.tiny_llama().eval()
    ids, mask = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0)), torch.ones(3, 9, dtype=torch.long)
    plain = gradients(model, ids, mask)[1]
    with quick_attention():
        assert torch.equal(gradients(model, ids, mask)[1], plain)
