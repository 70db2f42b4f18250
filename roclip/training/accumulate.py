"""Gradient accumulation for a contrastive loss: a batch in pieces, with the loss over the whole batch and exact gradients.

A contrastive loss does not split over micro-batches, since each pair is every other pair's negative. So the features of the
whole batch are computed first, without a graph; the loss gives the gradient with respect to each feature; then each piece is
run again, with a graph, and these gradients are propagated through it:

    dL/dw = sum_m sum_i <dL/dx_i, dx_i/dw>,  i in piece m

It takes the memory of one piece plus the features, and the time of one more forward pass.
Source: GradCache (arXiv:2101.06983), as in open_clip's `--accum-freq`, which computes the loss once a piece; here it is computed
once.
Letters: B local batch, D feature width, L caption tokens, m pieces.
"""

import contextlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from roclip.model.batch_norm import frozen_statistics

Backward: TypeAlias = Callable[[Tensor], None]


def forward(
    engine: Any, images: Tensor, tokens: Tensor, *, pieces: int = 1, text_gradient: bool = True
) -> tuple[tuple[Tensor, ...], Backward]:
    """The towers' outputs for this rank's batch, and a function that runs the backward pass of a loss of them.

    Between the two calls anything may use the features: the pool's search, the sample filter, any loss. `engine.step()` follows.

    Args:
        engine: The engine of `build_engine`, with `train.grad_accum_steps` = pieces.
        images: (B, 3, H, W).
        tokens: (B, L); the number of captions may differ from that of images.
        pieces: m, which divides B and the number of captions. 1 is the ordinary way, with one pass and one graph.
        text_gradient: Whether the text tower gets a gradient; see `Towers`.

    Returns:
        `(image_features, text_features, logit_scale[, logit_bias])` for the whole batch, and `backward(loss)`.

    The second pass draws the same random numbers as the first (patch dropout). Batch norm normalises each piece by itself, so
    with batch norm the gradient is that of the pieces; its running statistics are updated once a piece.
    """
    if pieces == 1:
        return engine(images, tokens, text_gradient=text_gradient), engine.backward
    batches = list(zip(images.chunk(pieces), tokens.chunk(pieces), strict=True))
    states, found = [], []
    with torch.no_grad():
        for batch in batches:
            states.append(_random_state(images.device))
            found.append(engine(*batch, text_gradient=text_gradient))
    image_features, text_features = (torch.cat(column) for column in list(zip(*found, strict=True))[:2])
    leaves = (image_features.requires_grad_(), text_features.requires_grad_(text_gradient))
    # detached: the bias is a weight itself, whose .grad is the second pass's to fill
    leaves += tuple(value.detach().requires_grad_() for value in found[0][2:])

    def backward(loss: Tensor) -> None:
        loss.backward()
        gradients = [None if leaf.grad is None else leaf.grad.chunk(pieces) for leaf in leaves[:2]]
        for number, (batch, state) in enumerate(zip(batches, states, strict=True)):
            last = number == pieces - 1
            engine.set_gradient_accumulation_boundary(last)
            with _random_numbers_from(state, images.device), frozen_statistics(engine.module):
                outputs = engine(*batch, text_gradient=text_gradient)
            wanted = [None if gradient is None else gradient[number] for gradient in gradients]
            # the temperature is in every pass, but its gradient is of the whole batch: it counts once
            wanted += [leaf.grad if last else None for leaf in leaves[2:]]
            engine.backward(_inner(outputs, wanted), scale_wrt_gas=False)

    return leaves, backward


def _inner(outputs: tuple[Tensor, ...], gradients: list[Tensor | None]) -> Tensor:
    """sum <output, gradient>, whose gradient with respect to each output is the given one."""
    zero = outputs[0].new_zeros(())
    return sum(((x * g).sum() for x, g in zip(outputs, gradients, strict=True) if g is not None), start=zero)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextlib.contextmanager
def _random_numbers_from(state: list[Tensor], device: torch.device):
    """Set the random generators to `state`, and restore them afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], device)
        yield
