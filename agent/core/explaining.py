"""Why a question about a name gets the answer that it gets, told to an operator.

What stands opposite: names.py, which answers; `vxmesh resolve` shows this.
"""

from __future__ import annotations

from agent.core.names import Kind, Names, View, subject_of
from agent.core.nametables import NetworkNames
from agent.core.question import Question, reverse_prefix
from agent.notation import format_address


def explain(names: Names, question: Question, view: View) -> list[str]:
    """Why `question` gets the answer that it gets, a sentence a line, for an operator.

    Says more than the asker may know, such as that another network has the name.
    """
    answer = names.answer(question, view)
    if view:
        lines = [f"the asker is in {', '.join(_title(names, id) for id in view)}"]
    else:
        lines = ["the asker has no address of a sandbox of this node, so it is in no network"]
    lines.append(answer.why)
    network = names.networks.get(answer.network)
    if answer.kind is Kind.ANSWER and network is not None:
        lines.extend(_meant(network, _title(names, answer.network), question))
    if answer.kind is not Kind.ANSWER and question.labels:
        name = question.labels[subject_of(question.labels)]
        lines.extend(
            f"{_title(names, id)} has the name {name}, but the asker is not in it"
            for id, other in names.networks.items()
            if id not in view and name in other
        )
    return lines


def _meant(network: NetworkNames, title: str, question: Question) -> list[str]:
    """Of what the answer is made, a line each."""
    prefix = reverse_prefix(question.labels)
    subject = question.labels[subject_of(question.labels)]
    if prefix is None or prefix.address is None:
        service = network.service(subject)
        ids = network.holders(subject)
    else:
        of = network.vips.get(prefix.address)
        service = network.services[of] if of else None
        ids = [] if service else [network.addresses[prefix.address]]
    lines = []
    if service is not None:
        ids = [backend.endpoint for backend, _ in network.backends(service)]
        vips = ", ".join(map(format_address, service.vips)) or "no VIP"
        ready = f"{len(ids)} of its backends take connections"
        lines.append(f"service {service.name} in {title}: {vips}, {ready}")
    for id in ids:
        name, aliases, addresses = network.endpoints[id]
        also = f" (also {', '.join(aliases)})" if aliases else ""
        has = ", ".join(format_address(address) for address in addresses)
        lines.append(f"endpoint {id} in {title}: {name}{also}, {has}")
    return lines


def _title(names: Names, id: str) -> str:
    network = names.networks.get(id)
    return f"network {network.name}" if network is not None and network.name else f"network {id}"
