"""One compiler pass for a CPU: products of few rows with a weight as fused sums. Knows graphs only.

A decoding step multiplies one row with every weight of the model, so its time is the time to read
the weights. The library routine behind ``mm`` reads them at less than half of the memory's speed in
that case; written as a multiplication and a sum, the compiler makes a loop that reads at full speed
and fuses with what stands around it. Accumulates in float32 whatever the dtype.
"""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

MOST_ROWS = 1  # measured: at 8 rows the library's blocked product is as fast

aten, convert = torch.ops.aten, torch.ops.prims.convert_element_type.default


class ProductsAsSums(CustomGraphPass):
    """Rewrites ``a @ b`` for a [M, K] with few rows M as ``sum_k b[k, n] a[m, k]``."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target in (aten.mm.default, aten.addmm.default):
                left, right = node.args[-2:]
                if left.meta["val"].shape[0] <= MOST_ROWS and left.meta["val"].device.type == "cpu":
                    with graph.inserting_before(node):
                        made = _product(graph, node, left, right)
                    made.meta["val"] = node.meta["val"]  # the next product may look at it
                    node.replace_all_uses_with(made)
                    graph.erase_node(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _product(graph: torch.fx.Graph, node: Any, left: Any, right: Any) -> Any:
    dtype = left.meta["val"].dtype
    call = graph.call_function
    right = call(aten.permute.default, (right, [1, 0]))  # [N, K], as the weight lies in memory
    if dtype != torch.float32:
        left, right = (call(convert, (side, torch.float32)) for side in (left, right))
    wide = call(aten.unsqueeze.default, (left, 0)), call(aten.unsqueeze.default, (right, 1))
    made = call(aten.sum.dim_IntList, (call(aten.mul.Tensor, wide), [2]))  # [N, M]
    made = call(aten.permute.default, (made, [1, 0]))
    if node.target is aten.addmm.default:
        made = call(aten.add.Tensor, (made, node.args[0]))
    return made if dtype == torch.float32 else call(convert, (made, dtype))
