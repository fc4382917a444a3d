"""Which input is the latent, which the timestep, which the prompt: inferred, and overridable."""

from __future__ import annotations

from collections.abc import Mapping

from effuse.errors import ConfigError, nearest
from effuse.plan import Role

# The names that networks of the field give their inputs. Everything else is taken for a prompt
# input (fixed for one picture), unless no latent was found by name: then the first one is it.
LATENT_NAMES = {"sample", "hidden_states", "x", "latent", "latents", "noisy_latents", "x_t", "z"}
TIMESTEP_NAMES = {
    "timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level", "noise",
    "log_snr", "logsnr", "lambda_t",
}  # fmt: skip


def infer_roles(
    shapes: Mapping[str, int], overrides: Mapping[str, str | Role] | None = None
) -> dict[str, Role]:
    """Roles for inputs given as label -> number of dimensions, in forward's order.

    Raises:
        ConfigError: an override names an input or a role that does not exist, or no input is left
            to be the latent.
    """
    chosen = {label: _parse(label, role, shapes) for label, role in (overrides or {}).items()}
    roles: dict[str, Role] = {}
    for label, dims in shapes.items():
        word = label.rsplit(".", maxsplit=1)[-1].lower()
        if label in chosen:
            roles[label] = chosen[label]
        elif word in TIMESTEP_NAMES and dims <= 1:
            roles[label] = Role.TIMESTEP
        elif word in LATENT_NAMES and Role.LATENT not in roles.values():
            roles[label] = Role.LATENT
        else:
            roles[label] = Role.PROMPT
    free = [label for label, role in roles.items() if role is Role.PROMPT and label not in chosen]
    if Role.LATENT not in roles.values() and free:
        roles[free[0]] = Role.LATENT
    if Role.LATENT not in roles.values():
        raise ConfigError(
            f"roles: none of {', '.join(map(repr, roles))} is the latent; name the input that "
            "changes every step: roles={'…': 'latent'}"
        )
    return roles


def _parse(label: str, role: str | Role, known: Mapping[str, int]) -> Role:
    if label not in known:
        raise ConfigError(f"roles: no input is called {label!r}{nearest(label, known)}")
    try:
        return Role(role)
    except ValueError:
        choices = [each.value for each in Role]
        message = f"roles: {label!r} has the role {role!r}{nearest(str(role), choices)}"
        raise ConfigError(message) from None
