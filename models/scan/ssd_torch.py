"""Mamba-2's scan in plain torch, on any device: state-space duality as matrix products, one chunk after the other.

Within a chunk the recurrence is a masked product like attention; a state carries over what came before. Of a whole
sequence only the states between chunks are kept for the backward pass, which computes everything else again.

Shapes: B batch, L time, H heads, P head width, N state, D all channels (H x P), J chunks, K and S steps of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Longer chunks cost more in the products within them, shorter ones more in states, which take time and memory.
CHUNK = 64
# Shorter time steps count as this one, so that all have a logarithm; no output can tell.
SHORTEST_STEP = 1e-30


def chunked_scan(x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_H: Tensor) -> Tensor:
    """As `models.scan.ssd.ssd_scan` for one group of heads (arXiv 2405.21060, section 6), in any floating dtypes."""
    y_BLHP: Tensor = _SSDScan.apply(x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, D_H)  # type: ignore[no-untyped-call]
    return y_BLHP


def state_dtype(x_BLHP: Tensor, dt_BLH: Tensor) -> torch.dtype:
    """Of states and decays: float32 at least."""
    return torch.promote_types(torch.promote_types(x_BLHP.dtype, dt_BLH.dtype), torch.float32)


class _Decays(NamedTuple):
    """What the time steps come to, of all chunks or of one; every chunk starts anew."""

    log_BLH: Tensor  # float64: sum of dt A up to a step
    log_source_BLH: Tensor  # float64: the same less log dt
    after_BLH: Tensor  # decay from the state before the chunk to a step
    until_BLH: Tensor  # decay from a step to the end of its chunk
    dt_BLH: Tensor
    into_BLH: Tensor  # dt times `until`: the weight of a step's input in the state after the chunk

    @classmethod
    def of(cls, dt_BLH: Tensor, A_H: Tensor, dtype: torch.dtype) -> _Decays:
        # Differences of sums become exponents: float64 keeps a small one right where a large one went before.
        dt_BLH = dt_BLH.double().clamp_min(SHORTEST_STEP)
        log_BJKH = _in_chunks(dt_BLH * A_H.double()).cumsum(2)
        until_BLH = _joined(log_BJKH[:, :, -1:] - log_BJKH, dt_BLH).exp()
        log_BLH = _joined(log_BJKH, dt_BLH)
        logs = (_time_innermost(log_BLH), _time_innermost(log_BLH - dt_BLH.log()))
        return cls(*logs, *(part.to(dtype) for part in (log_BLH.exp(), until_BLH, dt_BLH, dt_BLH * until_BLH)))

    def split(self) -> list[_Decays]:
        return [_Decays(*parts) for parts in _split(*self)]

    def weights(self) -> Tensor:
        """The decay from step s to step k of a chunk, times dt_s; zero for s > k; (B, H, K, S)."""
        log_BHK, log_source_BHS = self.log_BLH.transpose(1, 2), self.log_source_BLH.transpose(1, 2)
        weights_BHKS = self.dt_BLH.new_empty(*log_BHK.shape, log_BHK.shape[2])
        torch.sub(log_BHK.unsqueeze(3), log_source_BHS.unsqueeze(2), out=weights_BHKS)
        # Above the diagonal the exponential may overflow; tril_ overwrites that, whatever it is.
        return weights_BHKS.exp_().tril_()


class _DecayGradients(NamedTuple):
    """Gradients of the logarithms of decays, by where these start and end; of all chunks or of one, in float64."""

    now_BLH: Tensor  # from a step to itself, which is only its dt
    from_BLH: Tensor  # from a step to later ones of its chunk
    to_BLH: Tensor  # from earlier ones of its chunk to a step
    after_BLH: Tensor  # from the state before the chunk to a step
    until_BLH: Tensor  # from a step to the end of its chunk, dt included
    whole_BLH: Tensor  # of the whole chunk, at its first step

    @classmethod
    def zeros(cls, decays: _Decays) -> _DecayGradients:
        return cls(*decays.log_BLH.new_zeros(6, *decays.log_BLH.shape))

    def split(self) -> list[_DecayGradients]:
        return [_DecayGradients(*parts) for parts in _split(*self)]

    def of_dt_and_A(self, decays: _Decays, A_H: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, H) and (H,)."""
        # A step's dt A is part of every decay that starts before it and ends with it or later.
        ends_BJKH = _in_chunks(self.to_BLH - self.from_BLH + self.after_BLH)
        starts_BJKH = F.pad(_in_chunks(self.until_BLH)[:, :, :-1], (0, 0, 1, 0))
        whole_BJ1H = self.whole_BLH[:, ::CHUNK].unsqueeze(2)
        dlog_BLH = _joined(ends_BJKH.flip(2).cumsum(2).flip(2) + starts_BJKH.cumsum(2) + whole_BJ1H, self.now_BLH)
        ddt_BLH = (self.now_BLH + self.from_BLH + self.until_BLH) / decays.dt_BLH + dlog_BLH * A_H
        return ddt_BLH, (dlog_BLH * decays.dt_BLH).sum((0, 1))


class _SSDScan(torch.autograd.Function):
    """`chunked_scan`."""

    @staticmethod
    def forward(
        ctx: Any, x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_H: Tensor
    ) -> Tensor:
        dtype = state_dtype(x_BLHP, dt_BLH)
        y_BLHP = _empty_like(x_BLHP)
        decays = _Decays.of(dt_BLH, A_H, dtype).split()
        starts: list[Tensor] = []  # states before all chunks but the first, whose is zero
        for i, (x_BKHP, y_BKHP, B_BKN, C_BKN) in enumerate(_split(x_BLHP, y_BLHP, B_BLN.to(dtype), C_BLN.to(dtype))):
            decay = decays[i]
            mixer_BHKS = decay.weights().mul_(torch.bmm(C_BKN, B_BKN.mT).unsqueeze(1))
            mixer_BHKS.diagonal(dim1=2, dim2=3).add_(D_H.unsqueeze(-1))
            within_BKHP = _product(mixer_BHKS, _by_head(x_BKHP, dtype)).transpose(1, 2)
            if starts:
                recalled_BKHP = torch.bmm(C_BKN, starts[-1]).view(x_BKHP.shape)
                torch.addcmul(within_BKHP, recalled_BKHP, decay.after_BLH.unsqueeze(-1), out=y_BKHP)
            else:
                y_BKHP.copy_(within_BKHP)
            if i + 1 < len(decays):
                input_BKD = (x_BKHP * decay.into_BLH.unsqueeze(-1)).flatten(2)
                before_BND = _scaled(starts[-1], decay.after_BLH[:, -1]) if starts else None
                starts.append(_plus_product(before_BND, B_BKN.mT, input_BKD))
        ctx.save_for_backward(x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, D_H, *starts)
        return y_BLHP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHP: Tensor) -> tuple[Tensor, ...]:
        x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, D_H, *starts = ctx.saved_tensors
        dtype = state_dtype(x_BLHP, dt_BLH)
        decays = _Decays.of(dt_BLH, A_H, dtype)
        dx_BLHP, dB_BLN, dC_BLN = (_empty_like(part) for part in (x_BLHP, B_BLN, C_BLN))
        dD_H = torch.zeros_like(D_H, dtype=dtype)
        ddecays = _DecayGradients.zeros(decays)
        parts = (x_BLHP, dy_BLHP, B_BLN.to(dtype), C_BLN.to(dtype), dx_BLHP, dB_BLN, dC_BLN)
        chunks = list(zip(_split(*parts), decays.split(), ddecays.split(), strict=True))
        dh_BND: Tensor | None = None  # of the state after the chunk, where there is one
        for i in reversed(range(len(chunks))):
            (x_BKHP, dy_BKHP, B_BKN, C_BKN, dx_BKHP, dB_BKN, dC_BKN), decay, ddecay = chunks[i]

            # y = (weights * C B^T + D) x, as far as it is within the chunk
            weights_BHKS, scores_BKS = decay.weights(), torch.bmm(C_BKN, B_BKN.mT)
            x_BHKP, dy_BHKP = _by_head(x_BKHP, dtype), _by_head(dy_BKHP, dtype)
            dmixer_BHKS = _product(dy_BHKP, x_BHKP.mT)
            dD_H += dmixer_BHKS.diagonal(dim1=2, dim2=3).sum((0, 2))
            dmixer_BHKS *= weights_BHKS
            dscores_BKS = dmixer_BHKS.sum(1)
            dmixer_BHKS *= scores_BKS.unsqueeze(1)
            ddecay.now_BLH.copy_(dmixer_BHKS.diagonal(dim1=2, dim2=3).transpose(1, 2))
            # The diagonal knows no decay; it would drown decays that are small.
            dmixer_BHKS.diagonal(dim1=2, dim2=3).zero_()
            dlog_BHKS = dmixer_BHKS.double()  # what starts and what ends at a step has to cancel to the last bit
            torch.sum(dlog_BHKS, 2, out=ddecay.from_BLH.transpose(1, 2))
            torch.sum(dlog_BHKS, 3, out=ddecay.to_BLH.transpose(1, 2))
            mixer_BHKS = weights_BHKS.mul_(scores_BKS.unsqueeze(1))
            mixer_BHKS.diagonal(dim1=2, dim2=3).add_(D_H.unsqueeze(-1))
            within_BKHP = _product(mixer_BHKS.mT, dy_BHKP).transpose(1, 2)
            dB, dC = torch.bmm(dscores_BKS.mT, C_BKN), torch.bmm(dscores_BKS, B_BKN)

            if dh_BND is None:
                dx_BKHP.copy_(within_BKHP)
            else:  # h_after = ... + B^T (into x)
                into_BKH1 = decay.into_BLH.unsqueeze(-1)
                dinput_BKHP = torch.bmm(B_BKN, dh_BND).view(x_BKHP.shape)
                torch.addcmul(within_BKHP, dinput_BKHP, into_BKH1, out=dx_BKHP)
                input_BKHP = x_BKHP * into_BKH1
                dB.baddbmm_(input_BKHP.flatten(2), dh_BND.mT)
                ddecay.until_BLH.copy_(dinput_BKHP.mul_(input_BKHP).sum(3))
            if i > 0:  # y = ... + after C h_before and h_after = ... + whole h_before
                h_BND = starts[i - 1]
                dy_after_BKHP = dy_BKHP * decay.after_BLH.unsqueeze(-1)
                dy_after_BKD = dy_after_BKHP.flatten(2)
                dC.baddbmm_(dy_after_BKD, h_BND.mT)
                recalled_BKHP = torch.bmm(C_BKN, h_BND).view(x_BKHP.shape)
                ddecay.after_BLH.copy_(recalled_BKHP.mul_(dy_after_BKHP).sum(3))
                if dh_BND is not None:
                    dh_BND = _scaled(dh_BND, decay.after_BLH[:, -1])
                    dwhole_BHP = (dh_BND * h_BND).sum(1).view(x_BKHP[:, 0].shape)
                    ddecay.whole_BLH[:, 0].copy_(dwhole_BHP.sum(2))
                dh_BND = _plus_product(dh_BND, C_BKN.mT, dy_after_BKD)
            dB_BKN.copy_(dB)
            dC_BKN.copy_(dC)
        ddt_BLH, dA_H = ddecays.of_dt_and_A(decays, A_H)
        return dx_BLHP, ddt_BLH.to(dt_BLH.dtype), dA_H.to(A_H.dtype), dB_BLN, dC_BLN, dD_H.to(D_H.dtype)


def _split(*parts: Tensor) -> list[tuple[Tensor, ...]]:
    """What belongs to each chunk."""
    return list(zip(*(torch.split(part, CHUNK, 1) for part in parts), strict=True))


def _in_chunks(part_BLH: Tensor) -> Tensor:
    """(B, J, K, H), J chunks, with zeros after the end."""
    return torch.unflatten(F.pad(part_BLH, (0, 0, 0, -part_BLH.shape[1] % CHUNK)), 1, (-1, CHUNK))


def _joined(part_BJKH: Tensor, like_BLH: Tensor) -> Tensor:
    return part_BJKH.flatten(1, 2)[:, : like_BLH.shape[1]]


def _time_innermost(part_BLH: Tensor) -> Tensor:
    """The same in another layout, for operations along time."""
    return part_BLH.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_like(part: Tensor) -> Tensor:
    """Contiguous, even if `part` is not."""
    return torch.empty(part.shape, dtype=part.dtype, device=part.device)


def _by_head(part_BKHP: Tensor, dtype: torch.dtype) -> Tensor:
    return part_BKHP.transpose(1, 2).to(dtype).contiguous()


def _scaled(h_BND: Tensor, decay_BH: Tensor) -> Tensor:
    return (torch.unflatten(h_BND, 2, (decay_BH.shape[1], -1)) * decay_BH[:, None, :, None]).flatten(2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of matrices (B, H, ...)."""
    return torch.unflatten(torch.bmm(a.flatten(0, 1), b.flatten(0, 1)), 0, a.shape[:2])


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)
