"""The methods by the name a recipe gives as `kind`."""

from .delta import Delta, DeltaClosedForm
from .full import FullFineTuning
from .lora import LoRA
from .none import MoreSampling, NoAdaptation

AnyMethod = NoAdaptation | MoreSampling | FullFineTuning | LoRA | Delta | DeltaClosedForm

METHODS: dict[str, type[AnyMethod]] = {
    "none": NoAdaptation,
    "more_sampling": MoreSampling,
    "full": FullFineTuning,
    "lora": LoRA,
    "delta": Delta,
    "delta_closed_form": DeltaClosedForm,
}


def adapts(method: AnyMethod) -> bool:
    """Whether a method changes the network."""
    return not isinstance(method, NoAdaptation | MoreSampling)
