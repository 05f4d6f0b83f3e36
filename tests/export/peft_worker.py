"""What PEFT makes of adapters: python peft_worker.py JOB, which test_peft_library.py writes.

The job names base models, adapters and merged models, with token ids; logits, and adapters that PEFT itself has made,
go to the folders of the models.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch  # pyrefly: ignore[missing-import]
from peft import LoraConfig, PeftModel, get_peft_model  # pyrefly: ignore[missing-import]
from transformers import AutoModelForCausalLM  # pyrefly: ignore[missing-import]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    ids = torch.tensor(job["ids"])
    for entry in job["models"]:
        out = Path(entry["out"])

        def write(name: str, model: torch.nn.Module, out: Path = out) -> None:
            with torch.no_grad():
                np.save(out / name, model.eval()(ids).logits.float().numpy())

        def base(entry: dict[str, str] = entry) -> torch.nn.Module:
            return AutoModelForCausalLM.from_pretrained(entry["base"], dtype=torch.float32)

        write("merged.npy", AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32))
        adapter = PeftModel.from_pretrained(base(), out / "adapter")
        write("adapter.npy", adapter)
        write("adapter_merged.npy", adapter.merge_and_unload())
        content = json.loads((out / "adapter" / "adapter_config.json").read_text())
        targets = content["target_modules"]
        torch.manual_seed(0)
        theirs = get_peft_model(base(), LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM"))
        for name, value in theirs.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.02)
        theirs.save_pretrained(out / "theirs")
        write("theirs.npy", theirs.merge_and_unload())


if __name__ == "__main__":
    main()
