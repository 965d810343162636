"""LoRA adapters as PEFT keeps them: read, checked, turned into task vectors and back."""
