"""What of a plan can be meant, but seldom is: said when it is submitted, and no error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.wording import counted

if TYPE_CHECKING:
    from coordinator.plan import Plan

_EVEN_STEPS = ("random", "power_of_choice", "oort", "refl", "eafl")  # selectors that give every device the same work
_OF_ANARCHIC = ("afa_cd", "afa_cs")


def hints(plan: Plan) -> list[str]:
    """One line each; none for most plans."""
    rules, training, said = plan.participation, plan.training, []
    most = rules.concurrency
    if most is not None and most < rules.target and rules.mode == "anarchic":
        said.append(
            f"participation.concurrency = {most} is below target = {rules.target}: a device has one update at a time "
            f"in the next model, so each will be made of at most {counted(most, 'update')}, after a silence"
        )
    if most is not None and most < rules.target and rules.mode == "buffered":
        said.append(
            f"participation.concurrency = {most} is below target = {rules.target}: a device starts no other job before "
            f"its update is in a model, so {counted(rules.target, 'device')} take turns for each, {most} at a time"
        )
    if training.min_steps > 1 and rules.mode != "anarchic" and rules.selector in _EVEN_STEPS:
        said.append(
            f"training.min_steps has no effect: selector {rules.selector!r} gives every device the same work; "
            "'energy_aware' gives less to weak ones"
        )
    if plan.server_method in _OF_ANARCHIC and rules.mode != "anarchic":
        said.append(
            f"server_method {plan.server_method!r} is made for mode 'anarchic', where devices choose their steps; mode "
            f"is {rules.mode!r}"
        )
    if plan.server_method == "refl" and rules.mode != "synchronous":
        said.append(
            "server_method 'refl' measures late updates against fresh ones, and of a run without rounds few are fresh; "
            "'fedbuff' is made for it"
        )
    return said
