"""The methods by the name a recipe gives as `kind`."""

from .delta import Delta, DeltaClosedForm
from .full import FullFineTuning
from .lora import LoRA
from .none import NoAdaptation

AnyMethod = NoAdaptation | FullFineTuning | LoRA | Delta | DeltaClosedForm

METHODS: dict[str, type[AnyMethod]] = {
    "none": NoAdaptation,
    "full": FullFineTuning,
    "lora": LoRA,
    "delta": Delta,
    "delta_closed_form": DeltaClosedForm,
}
