"""How PEFT comes to know a tuner that it does not have."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


def register(name: str, config: type, tuner: type[BaseTuner]) -> None:
    """name: in lower case, which `adapter_config.json` holds in upper case as `peft_type`.

    PEFT's registry only takes types of its enumeration, which is closed: the new one is added to it first.
    """
    word = name.upper()
    member = str.__new__(PeftType, word)
    member._name_ = member._value_ = word
    type.__setattr__(PeftType, word, member)
    PeftType._member_map_[word] = PeftType._value2member_map_[word] = member
    PeftType._member_names_.append(word)
    register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=tuner.prefix)
