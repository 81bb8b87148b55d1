"""The search for ptxas' fault tells a stack pointer that is a number from one that is an address."""

from __future__ import annotations

from tools.compiled_code import stack_pointer_as_number

GOOD = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   VIADD R1, R1, 0xfffff900 ;
        /*0f10*/                   STL [R1+0x190], R178 ;
        /*b510*/                   LDL.LU R195, [R1+0x190] ;
        /*b780*/                   IADD3 R178, P1, R10, 0x40, RZ ;
        /*b790*/              @!P0 IADD3 R178, P1, R11, R100, RZ ;
"""
BAD = """
        /*0ee0*/                   IADD3 R178, P1, R1, 0x40, RZ ;
        /*1010*/                   IADD3.X R10, R1.reuse, -0x7fffffe0, RZ, P1, !PT ;
"""


def test_addresses_on_the_stack_are_no_fault() -> None:
    assert list(stack_pointer_as_number(GOOD)) == []


def test_computing_with_the_stack_pointer_is() -> None:
    assert len(list(stack_pointer_as_number(GOOD + BAD))) == 2
