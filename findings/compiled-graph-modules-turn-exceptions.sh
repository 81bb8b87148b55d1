#!/bin/sh
# torch 2.13.0, on a CPU, 2026-11-30.
#
# An exception that passes through a compiled `fx.GraphModule` becomes another one: its `__call__` looks at the traceback with a generator,
# which dynamo intercepts ("Attempt to trace generator"). `torch.utils.checkpoint` stops the recomputation of a layer with an exception as
# soon as it has what it needs; with a compiled GraphModule inside the backward pass fails. `forward` compiled works.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
cat > run.py <<'PY'
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint


class Part(nn.Module):
    def forward(self, x, w):
        return torch.sin(x @ w)


graph = fx.symbolic_trace(Part())
weight = torch.randn(8, 8, requires_grad=True)


def gradient(part):
    weight.grad = None
    x = torch.ones(2, 8, requires_grad=True)
    checkpoint(lambda x: part(part(x, weight), weight), x, use_reentrant=False).sum().backward()
    return weight.grad.clone()


wanted = gradient(graph)
assert torch.allclose(gradient(torch.compile(graph.forward, backend="aot_eager", fullgraph=True)), wanted)
try:
    gradient(torch.compile(graph, backend="aot_eager", fullgraph=True))
except torch._dynamo.exc.Unsupported as error:
    print(f"seen: {str(error).splitlines()[0]}")
else:
    raise SystemExit("not seen any more")
PY
venv/bin/python run.py
