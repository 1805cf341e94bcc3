"""What a LoRA adapter changes and how strongly (Hu et al. 2021). Knows no weights."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """y = W x + lora_alpha / r · B A dropout(x) on every linear module whose name ends in one of `target_modules`.

    Raises:
        ValueError: a value is impossible; the message names the field.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | list[str] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r ({self.r}) must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout ({self.lora_dropout}) must be at least 0 and less than 1")
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise ValueError("target_modules must be a list of module names such as ['q_proj', 'v_proj']")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.r
