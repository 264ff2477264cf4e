"""What a kernel's first worker measured of its error, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def distortion_text(found: Mapping[str, Any]) -> list[str]:
    """What `sketches.distortion` found, in words.

    Args:
        found: as it was stored.

    Returns:
        Lines: the errors measured, and the bound.
    """
    worst = found["worst_group"]
    of_layers = f", {found['worst_group_error']:.1e} in {worst}, the worst" if worst else ""
    lines = [
        f"{found['method']} projection to {found['dim']}: relative error "
        f"{found['relative_error']:.1e} on {found['examples']} examples, against the exact kernel; "
        f"of single entries at most {found['largest_error']:.1e} |g| |g'|{of_layers}"
    ]
    if found["theorem"] is None:
        return [*lines, "No theorem bounds the error of a projection from two sides."]
    said = (
        f"Theorem {found['theorem']} (Malladi et al. 2023), for {found['gradients']} gradients, "
        f"{found['statements']} groups and their sum:"
    )
    needed = ", ".join(f"{dim} for {error}" for error, dim in found["dim_needed"].items())
    return [*lines, f"{said}{_limit(found)}. It needs kernel.projection.dim={needed}."]


def lora_text(found: Mapping[str, Any]) -> list[str]:
    """What `lora_error.lora_distortion` found, in words.

    Args:
        found: as it was stored.

    Returns:
        Lines: the errors measured, the bound on every module, and that on their sum.
    """
    modules = found["modules"]
    several = (
        f", {found['worst_module_error']:.2g} |g| |g'| in the worst module, {found['worst_module']}"
    )
    lines = [
        f"LoRA of rank {found['rank']}: relative error {found['relative_error']:.2g} on "
        f"{found['examples']} examples, of its kernel divided by its expected scale against the "
        f"kernel of the {modules} full weights; of single entries at most "
        f"{found['largest_error']:.2g} |g| |g'|" + (several if modules > 1 else "")
    ]
    said = f"Theorem D.5 (Malladi et al. 2023), for {found['gradients']} gradients"
    said += f" in each of {modules} modules:" if modules > 1 else ":"
    needed = ", ".join(f"{rank} for {error}" for error, rank in found["rank_needed"].items())
    lines.append(f"{said}{_limit(found)}. It needs parameters.r={needed}.")
    if modules > 1:
        remark = found["remark"]
        limit = (
            f"at most {remark:.2f} |g| |g'| with probability {1 - found['failure']:g}, were all "
            "modules' gradients of equal length"
            if remark is not None
            else "nothing either"
        )
        lines.append(f"Remark D.6, for the sum of the {modules} modules: {limit}.")
    return lines


def _limit(found: Mapping[str, Any]) -> str:
    """The bound of a theorem, or that it has none."""
    if found["bound"] is not None:
        return f" at most {found['bound']:.2f} |g| |g'| with probability {1 - found['failure']:g}"
    least = found["least_failure"]
    text = f" even 0.67 |g| |g'| may be exceeded with a probability of {least:.2g}"
    return text + (", so that it says nothing" if least >= 1 else "")
