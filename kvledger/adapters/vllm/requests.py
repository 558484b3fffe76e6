"""What a ledger has to know of a request of vLLM."""

from __future__ import annotations

from vllm.v1.request import Request, RequestStatus

from statemachine.content import Item, namespace_key
from statemachine.events import ReleaseReason

NULL_BLOCKS = 1
"""vLLM's block 0 stands for "nothing" in block tables and is never handed out; the ledger's block 0 is its block 1."""
_REASONS = {
    RequestStatus.FINISHED_ABORTED: ReleaseReason.ABORTED,
    RequestStatus.FINISHED_ERROR: ReleaseReason.FAILED,
}


def release_reason(request: Request) -> ReleaseReason:
    """Why a request that is being freed gives its blocks back."""
    if not request.is_finished():
        return ReleaseReason.PREEMPTED
    return _REASONS.get(request.status, ReleaseReason.FINISHED)


def items_of(request: Request) -> list[Item]:
    """Images and the like in its prompt."""
    return [
        Item(feature.identifier.encode(), feature.mm_position.offset, feature.mm_position.length)
        for feature in request.mm_features or ()
    ]


def namespace_of(request: Request) -> bytes:
    """What nothing may match across: its adapter, its salt."""
    lora = request.lora_request.lora_name if request.lora_request is not None else ""
    salt = request.cache_salt or ""
    if request.prompt_embeds is not None:
        salt = f"{salt}\0embeddings of {request.request_id}"  # their content is not in the tokens: nobody may match it
    return namespace_key(lora=lora, salt=salt) if lora or salt else b""
