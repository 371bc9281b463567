"""Which desired states an agent accepts: its own, and never an older one. Pure."""

from core.errors import Conflict, Forbidden
from core.fleet_state import DesiredState, Position
from core.ids import AgentId


def require_admissible(
    desired: DesiredState, *, agent_id: AgentId, applied: Position, target: DesiredState | None
) -> None:
    """Raise unless `desired` is for `agent_id`, newer than `applied`, and not older than the `target` worked on.

    Raises:
        Forbidden: it is another agent's.
        Conflict: it is older, or it differs from the target although it has the same position.
    """
    if desired.agent_id != agent_id:
        raise Forbidden(f"desired state: expected agent {agent_id}, got {desired.agent_id}")
    if desired.position <= applied:
        raise Conflict(f"desired state: expected a position after {_text(applied)}, got {_text(desired.position)}")
    if target is None or desired == target:
        return
    if desired.position <= target.position:
        raise Conflict(
            f"desired state: expected a position after {_text(target.position)}, got {_text(desired.position)}"
        )


def _text(position: Position) -> str:
    return f"(epoch {position.epoch}, generation {position.generation})"
