"""The Linear Recurrent Unit (arXiv 2303.06349), its complex weights as separate real parameters.

Shapes: B batch, L time, H d_model, N d_state, R d_state after a cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compression.gramians import LTISystem
from compression.moments import ComplexMoments, ParameterState
from compression.plan import LayerPlan, StateTransform
from models.layer import StackConfig, State, TruncatableLayer
from models.scan.linear import linear_recurrence

# The parametrisation exp(-exp(nu) + i exp(theta)) has no zero eigenvalue; this stands for one.
SMALLEST_MAGNITUDE = 1e-12
SMALLEST_PHASE = 1e-3


class LRUConfig(StackConfig):
    """A stack of LRU blocks, each with a gated linear unit after the recurrence."""

    kind: Literal["lru"]
    r_min: float = Field(0.9, ge=0, lt=1, description="Smallest magnitude of an eigenvalue at the start.")
    r_max: float = Field(0.999, gt=0, lt=1, description="Largest magnitude of an eigenvalue at the start.")
    max_phase: float = Field(2 * math.pi, gt=0, description="Largest phase of an eigenvalue, in radians.")

    @model_validator(mode="after")
    def _ring_has_a_width(self) -> LRUConfig:
        if self.r_min >= self.r_max:
            raise ValueError(f"r_min {self.r_min:g} must lie below r_max {self.r_max:g}")
        return self


class LRU(TruncatableLayer):
    """Linear recurrence followed by GELU and a gated linear unit, (B, L, H) -> (B, L, H)."""

    statistics_need_tokens = False
    ssm_parameters = frozenset({"nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D"})

    def __init__(self, config: LRUConfig, d_state: int) -> None:
        super().__init__()
        self.d_state = d_state
        N, H = d_state, config.d_model
        # Uniform on the ring between r_min and r_max (LRU paper, lemma 3.2).
        magnitude2_N = torch.rand(N) * (config.r_max**2 - config.r_min**2) + config.r_min**2
        nu_log_N = (-0.5 * magnitude2_N.log()).log()
        theta_log_N = (config.max_phase * (1 - torch.rand(N))).log()
        self.nu_log = nn.Parameter(nu_log_N)
        self.theta_log = nn.Parameter(theta_log_N)
        self.gamma_log = nn.Parameter((1 - magnitude2_N).sqrt().log())
        self.B_re = nn.Parameter(torch.randn(N, H) / math.sqrt(2 * H))
        self.B_im = nn.Parameter(torch.randn(N, H) / math.sqrt(2 * H))
        self.C_re = nn.Parameter(torch.randn(H, N) / math.sqrt(N))
        self.C_im = nn.Parameter(torch.randn(H, N) / math.sqrt(N))
        self.D = nn.Parameter(torch.randn(H))
        self.glu = nn.Linear(H, 2 * H)

    def forward(self, x_BLH: Tensor) -> Tensor:
        eigenvalues_N = torch.polar((-self.nu_log.exp()).exp(), self.theta_log.exp())
        gamma_N1 = self.gamma_log.exp().unsqueeze(-1)
        system = (eigenvalues_N.real, eigenvalues_N.imag, self.B_re * gamma_N1, self.B_im * gamma_N1)
        y_BLH = linear_recurrence(x_BLH, *system, self.C_re, self.C_im) + self.D * x_BLH
        out_BLH: Tensor = nn.functional.glu(self.glu(nn.functional.gelu(y_BLH)), dim=-1)
        return out_BLH

    def initial_state(self, batch: int) -> State:
        """Real and imaginary part of the state, (B, N) each."""
        re_BN, im_BN = torch.zeros(2, batch, self.d_state, device=self.D.device)
        return re_BN, im_BN

    def step(self, x_BH: Tensor, state: State) -> tuple[Tensor, State]:
        re_BN, im_BN = state
        magnitude_N, phase_N, gamma_N = torch.exp(-self.nu_log.exp()), self.theta_log.exp(), self.gamma_log.exp()
        cos_N, sin_N = magnitude_N * phase_N.cos(), magnitude_N * phase_N.sin()
        re_BN, im_BN = (
            cos_N * re_BN - sin_N * im_BN + gamma_N * (x_BH @ self.B_re.T),
            sin_N * re_BN + cos_N * im_BN + gamma_N * (x_BH @ self.B_im.T),
        )
        y_BH = re_BN @ self.C_re.T - im_BN @ self.C_im.T + self.D * x_BH
        out_BH: Tensor = nn.functional.glu(self.glu(nn.functional.gelu(y_BH)), dim=-1)
        return out_BH, (re_BN, im_BN)

    def start_statistics(self) -> None:
        """Nothing to gather: an LTI layer's Gramians follow from its weights."""

    @torch.no_grad()
    def finish_statistics(self) -> LTISystem:
        system = self.system()
        return LTISystem(system.eigenvalues_N.cpu(), system.B_NH.cpu(), system.C_HN.cpu())

    def system(self) -> LTISystem:
        """The recurrence alone, in complex128, through which gradients go back to the parameters.

        Its output is the real part of C h, which does not change when a state is conjugated, with its rows of B and
        columns of C. What can be merged with others does: here no eigenvalue lies below the real axis.
        """
        side_N = _side(self.theta_log)
        phase_N = side_N * self.theta_log.double().exp()
        eigenvalues_N = torch.exp(torch.complex(-self.nu_log.double().exp(), phase_N))
        gamma_N1 = self.gamma_log.double().exp().unsqueeze(-1)
        B_NH = torch.complex(self.B_re.double(), side_N[:, None] * self.B_im.double()) * gamma_N1
        C_HN = torch.complex(self.C_re.double(), side_N * self.C_im.double())
        return LTISystem(eigenvalues_N, B_NH, C_HN)

    def shrink(self, plan: LayerPlan, states: Mapping[str, ParameterState]) -> dict[str, ParameterState]:
        """The balanced, truncated and diagonal system in the LRU's own parameters.

        B and C go through the plan's projections; their moments through the transposed inverses of those, which
        are the projections' biorthogonal partners. gamma keeps its ratio to the normalising value, a phase its
        multiple of 2 pi, and a state its side of the real axis, from the state that the new one has most of: a cut
        that loses nothing changes no parameter.
        """
        cut = plan.reduction
        assert isinstance(cut, StateTransform), "an LRU layer is cut by balanced truncation"
        device = states["nu_log"].value.device
        left_RN, right_NR, ancestors_R = (part.to(device) for part in (cut.left_RN, cut.right_NR, cut.ancestors_R))
        new_R = _polar(cut.eigenvalues_R.to(device))
        gamma_old_N = states["gamma_log"].value.double().exp()
        old_N = torch.exp(-states["nu_log"].value.double().exp())
        ratio_N = gamma_old_N / (1 - old_N.square()).sqrt()
        gamma_new_R = ratio_N[ancestors_R] * (1 - new_R.abs().square()).sqrt()
        # Plans are of `system`, where no state lies below the real axis.
        side_N = _side(states["theta_log"].value)
        side_R = side_N[ancestors_R]

        B_NH = torch.complex(states["B_re"].value.double(), side_N[:, None] * states["B_im"].value)
        B_RH = (left_RN @ (gamma_old_N[:, None] * B_NH)) / gamma_new_R[:, None]
        B_moments = ComplexMoments.of(states["B_re"], states["B_im"]).scaled(1, side_N[:, None])
        B_moments = B_moments.through(gamma_new_R[:, None] * right_NR.mH / gamma_old_N).scaled(1, side_R[:, None])
        B_re, B_im = B_moments.with_values(B_RH.real, side_R[:, None] * B_RH.imag)

        C_HN = torch.complex(states["C_re"].value.double(), side_N * states["C_im"].value)
        C_HR = C_HN @ right_NR
        C_moments = ComplexMoments.of(states["C_re"], states["C_im"]).scaled(1, side_N)
        C_moments = C_moments.T.through(left_RN.conj()).T.scaled(1, side_R)
        C_re, C_im = C_moments.with_values(C_HR.real, side_R * C_HR.imag)

        gamma_log = _shrink_gamma(states, B_re, B_im, gamma_new_R.log(), ancestors_R)
        nu_log, theta_log = _shrink_eigenvalues(states["nu_log"], states["theta_log"], cut, new_R, side_N, ancestors_R)
        return dict(states) | {
            "nu_log": nu_log,
            "theta_log": theta_log,
            "gamma_log": gamma_log,
            "B_re": B_re,
            "B_im": B_im,
            "C_re": C_re,
            "C_im": C_im,
        }


def _side(theta_log_N: Tensor) -> Tensor:
    """-1 where an eigenvalue lies below the real axis, else 1; float64."""
    below_N = theta_log_N.detach().double().exp().sin() < 0
    return torch.where(below_N, -1.0, 1.0).double()


def _polar(eigenvalues_R: Tensor) -> Tensor:
    """Eigenvalues that the parametrisation can hold: not zero, and not 1 to float32's rounding."""
    magnitude_R = eigenvalues_R.abs().clamp(SMALLEST_MAGNITUDE, 1 - torch.finfo(torch.float32).eps)
    return torch.polar(magnitude_R, eigenvalues_R.angle())


def _shrink_gamma(
    old: Mapping[str, ParameterState], B_re: ParameterState, B_im: ParameterState, value_R: Tensor, ancestors_R: Tensor
) -> ParameterState:
    """gamma_log, whose moments follow from those of B and from the ancestor's.

    exp(gamma_log) multiplies row i of B, so its gradient is the inner product of B_i and B_i's gradient. Averages of
    that differ from what B and its moments come to by how B moved meanwhile, and squares by correlations within the
    row. The ancestor tells both, so that a cut that loses nothing changes neither moment.
    """

    def inner(re: ParameterState, im: ParameterState) -> tuple[Tensor, Tensor]:
        first_N = (re.value.double() * re.exp_avg + im.value.double() * im.exp_avg).sum(1)
        second_N = (re.value.double() ** 2 * re.exp_avg_sq + im.value.double() ** 2 * im.exp_avg_sq).sum(1)
        return first_N, second_N

    gamma = old["gamma_log"]
    (first_N, second_N), (first_R, second_R) = inner(old["B_re"], old["B_im"]), inner(B_re, B_im)
    apart_N = gamma.exp_avg - first_N
    ratio_N = torch.where(second_N > 0, gamma.exp_avg_sq / second_N, 1.0)
    exp_avg_R, exp_avg_sq_R = first_R + apart_N[ancestors_R], second_R * ratio_N[ancestors_R]
    return ParameterState(value_R.float(), exp_avg_R.float(), exp_avg_sq_R.float())


def _shrink_eigenvalues(
    nu_log: ParameterState,
    theta_log: ParameterState,
    cut: StateTransform,
    new_R: Tensor,
    side_N: Tensor,
    ancestors_R: Tensor,
) -> tuple[ParameterState, ParameterState]:
    """New eigenvalues, and moments from first-order perturbation theory.

    To first order an eigenvalue of the reduced system moves by sum_n left_rn right_nr dlambda_n (Greenbaum, Li,
    Overton, SIAM Review 2020, theorem 1). In s = log lambda that is a linear map; gradients take its
    pseudo-inverse, conjugate transposed.
    """
    old_nu_N, old_theta_N = nu_log.value.double().exp(), theta_log.value.double().exp()
    side_R = side_N[ancestors_R]
    old_N = torch.exp(torch.complex(-old_nu_N, side_N * old_theta_N))
    sensitivity_RN = cut.left_RN.to(old_N.device) * cut.right_NR.to(old_N.device).T * old_N / new_R[:, None]
    gradient_map_RN = torch.linalg.pinv(sensitivity_RN.mH)

    # s = -exp(nu_log) + i side exp(theta_log)
    in_s = ComplexMoments.of(nu_log, theta_log).scaled(-1 / old_nu_N, side_N / old_theta_N)
    nu_R = -new_R.abs().log()
    phase_R = side_R * new_R.angle()
    turns_R = ((old_theta_N[ancestors_R] - phase_R) / (2 * math.pi)).round()
    theta_R = phase_R + 2 * math.pi * turns_R.clamp_min(0)
    # A real positive eigenvalue has phase 0, whose logarithm does not exist; 2 pi is the same phase. A phase next
    # to 0 moves there too: gradients scale with the phase, so it could not train.
    theta_R = torch.where(theta_R > SMALLEST_PHASE, theta_R, theta_R + 2 * math.pi)
    return in_s.through(gradient_map_RN).scaled(-nu_R, side_R * theta_R).with_values(nu_R.log(), theta_R.log())
