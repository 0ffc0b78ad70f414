package main

import (
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// winograd writes the transforms M t M' of winograd.go, for as many tiles at the
// same time as a vector has lanes: M comes as the instructions that multiply it by
// one column, first for the rows of a tile, kept in registers, then for its columns.
func winograd() {
	sandwich(transform{
		name: "spreadInputs", in: 6, out: 6, constants: []float32{4, 5}, temporary: 2,
		passes: [][]int{{0, 1, 2}, {3, 4, 5}}, // 36 values fill no 32 registers
		column: func(in func(int) Op, o, t, c []VecPhysical) {
			four, five := c[0], c[1]
			if o[0] != nil {
				move(in(2), t[0])
				move(in(1), t[1])
				move(in(4), o[1])
				move(in(3), o[2])
				move(o[1], o[0])
				VFNMADD231PS(five, t[0], o[0])
				VFMADD231PS(in(0), four, o[0])
				VFNMADD231PS(four, t[0], o[1])
				VFNMADD231PS(four, t[1], o[2])
				VSUBPS(o[2], o[1], t[0])
				VADDPS(o[2], o[1], o[1])
				move(t[0], o[2])
			}
			if o[3] != nil {
				move(in(3), t[0])
				move(in(1), t[1])
				move(in(4), o[3])
				VSUBPS(in(2), o[3], o[3])
				VSUBPS(t[1], t[0], o[4])
				move(in(5), o[5])
				VFNMADD231PS(five, t[0], o[5])
				VFMADD231PS(four, t[1], o[5])
				VADDPS(o[4], o[4], o[4])
				move(o[3], t[0])
				VADDPS(o[4], o[3], o[3])
				VSUBPS(o[4], t[0], o[4])
			}
		},
	})
	sandwich(transform{
		name: "gatherOutputs", in: 6, out: 4, constants: []float32{4}, temporary: 2, floor: true,
		column: func(in func(int) Op, o, t, c []VecPhysical) {
			four := c[0]
			move(in(1), o[0])
			VSUBPS(in(2), o[0], o[1])
			VADDPS(in(2), o[0], o[0])
			move(in(3), t[0])
			VSUBPS(in(4), t[0], t[1])
			VADDPS(in(4), t[0], t[0])
			move(o[0], o[2])
			VFMADD231PS(four, t[0], o[2])
			VADDPS(t[0], o[0], o[0])
			VADDPS(in(0), o[0], o[0])
			VADDPS(t[1], t[1], t[1])
			move(o[1], o[3])
			VFMADD231PS(four, t[1], o[3])
			VADDPS(in(5), o[3], o[3])
			VADDPS(t[1], o[1], o[1])
		},
	})
	sandwich(transform{
		name: "spreadOutputs", in: 4, out: 6, constants: []float32{4}, temporary: 1, through: map[int]int{0: 0, 5: 3},
		column: func(in func(int) Op, o, t, c []VecPhysical) {
			four := c[0]
			move(in(0), o[0])
			move(in(3), o[5])
			VADDPS(in(2), o[0], o[1])
			VADDPS(in(1), o[5], t[0])
			VSUBPS(t[0], o[1], o[2])
			VADDPS(t[0], o[1], o[1])
			move(o[0], o[3])
			VFMADD231PS(in(2), four, o[3])
			move(in(1), t[0])
			VFMADD231PS(o[5], four, t[0])
			VADDPS(t[0], t[0], t[0])
			VSUBPS(t[0], o[3], o[4])
			VADDPS(t[0], o[3], o[3])
		},
	})
	sandwich(transform{
		name: "scatterInputs", in: 6, out: 6, constants: []float32{4, 5}, temporary: 2, add: true,
		passes: [][]int{{0, 2, 4}, {1, 3, 5}},
		column: func(in func(int) Op, o, t, c []VecPhysical) {
			four, five := c[0], c[1]
			if o[0] != nil {
				move(in(1), t[0])
				move(in(3), t[1])
				VADDPS(in(2), t[0], t[0])
				VADDPS(in(4), t[1], t[1])
				move(in(0), o[0])
				VADDPS(t[0], o[0], o[4])
				VADDPS(t[1], o[4], o[4])
				move(t[0], o[2])
				VFNMSUB213PS(t[1], four, o[2])
				VFNMADD231PS(five, o[0], o[2])
				VMULPS(four, o[0], o[0])
			}
			if o[1] != nil {
				move(in(1), t[0])
				move(in(3), t[1])
				VSUBPS(in(2), t[0], t[0])
				VSUBPS(in(4), t[1], t[1])
				VADDPS(t[1], t[1], t[1])
				move(in(5), o[5])
				VMULPS(four, o[5], o[1])
				VSUBPS(t[1], o[1], o[1])
				VFNMADD231PS(four, t[0], o[1])
				VADDPS(t[1], t[0], o[3])
				VFNMADD231PS(five, o[5], o[3])
			}
		},
	})
	sandwich(transform{
		name: "spreadTaps", in: 3, out: 6, constants: []float32{1. / 4, 1. / 6, -1. / 6, 1. / 12, 1. / 24}, temporary: 1,
		column: func(in func(int) Op, o, t, c []VecPhysical) {
			move(in(0), t[0])
			move(in(2), o[5])
			VMULPS(c[0], t[0], o[0])
			VMULPS(c[4], t[0], o[3])
			VFMADD231PS(c[1], o[5], o[3])
			VADDPS(o[5], t[0], t[0])
			move(in(1), o[4])
			VSUBPS(t[0], o[4], o[2])
			VADDPS(t[0], o[4], o[1])
			VMULPS(c[1], o[2], o[2])
			VMULPS(c[2], o[1], o[1])
			VMULPS(c[3], o[4], t[0])
			VSUBPS(t[0], o[3], o[4])
			VADDPS(t[0], o[3], o[3])
		},
	})
	sandwich(transform{
		name: "gatherTaps", in: 6, out: 3, constants: []float32{1. / 4, 1. / 6, 1. / 12, 1. / 24}, temporary: 3,
		column: func(in func(int) Op, o, t, c []VecPhysical) {
			move(in(1), t[0])
			move(in(2), t[1])
			VADDPS(t[1], t[0], t[2])
			VSUBPS(t[0], t[1], t[1])
			VMULPS(c[1], t[1], o[1])
			move(in(0), o[0])
			VMULPS(c[0], o[0], o[0])
			VMULPS(c[1], t[2], t[2])
			VSUBPS(t[2], o[0], o[0])
			move(in(5), o[2])
			VSUBPS(t[2], o[2], o[2])
			move(in(3), t[0])
			move(in(4), t[1])
			VADDPS(t[1], t[0], t[2])
			VSUBPS(t[1], t[0], t[0])
			VFMADD231PS(c[2], t[0], o[1])
			VFMADD231PS(c[3], t[2], o[0])
			VFMADD231PS(c[1], t[2], o[2])
		},
	})
}

// transform is one of them: tiles of in x in become tiles of out x out.
type transform struct {
	name      string
	in, out   int
	constants []float32
	temporary int
	floor     bool        // results are at least that
	add       bool        // to what dst holds in the rows and columns that overlap
	passes    [][]int     // the outputs of the rows worked on at a time; nil: all
	through   map[int]int // outputs that are inputs
	column    func(in func(int) Op, o, t, c []VecPhysical)
}

func move(from Op, to VecPhysical) {
	switch from := from.(type) {
	case VecPhysical:
		if from != to {
			VMOVAPS(from, to)
		}
	default:
		VMOVUPS(from, to)
	}
}

// sandwich writes a transform, its distances in bytes.
func sandwich(t transform) {
	constants := GLOBL(t.name+"Constants", RODATA|NOPTR)
	for i, v := range t.constants {
		DATA(4*i, U32(math.Float32bits(v)))
	}
	signature := "func(dst, src *float32, dstRow, dstColumn, srcRow, srcColumn, vectors int)"
	if t.floor {
		signature = "func(dst, src *float32, dstRow, dstColumn, srcRow, srcColumn, vectors int, floor float32)"
	}
	TEXT(t.name, NOSPLIT, signature)
	Pragma("noescape")
	Load(Param("dst"), RDI)
	Load(Param("src"), RSI)
	Load(Param("dstRow"), R10)
	Load(Param("dstColumn"), RDX)
	Load(Param("srcRow"), R9)
	Load(Param("srcColumn"), R12)
	Load(Param("vectors"), RCX)
	LEAQ(Mem{Base: R10, Index: R10, Scale: 2}, R11)
	LEAQ(Mem{Base: R10, Index: R10, Scale: 4}, RBX)
	LEAQ(Mem{Base: R12, Index: R12, Scale: 2}, R13)
	LEAQ(Mem{Base: R12, Index: R12, Scale: 4}, R8)
	top := len(zmm)
	next := func() VecPhysical { top--; return zmm[top] }
	var c, temporary []VecPhysical
	for i := range t.constants {
		c = append(c, next())
		VBROADCASTSS(constants.Offset(4*i), c[i])
	}
	for range t.temporary {
		temporary = append(temporary, next())
	}
	floor := VecPhysical(nil)
	if t.floor {
		floor = next()
		Load(Param("floor"), X0)
		VBROADCASTSS(X0, floor)
	}
	passes := t.passes
	if passes == nil {
		all := make([]int, t.out)
		for i := range all {
			all[i] = i
		}
		passes = [][]int{all}
	}

	Label("vector")
	for _, pass := range passes {
		MOVQ(RSI, RAX)
		MOVQ(RDI, R14)
		rows := make([][]VecPhysical, t.in) // of what the rows became
		for r := range rows {
			rows[r] = make([]VecPhysical, t.out)
			for i, o := range pass {
				rows[r][o] = zmm[r*len(pass)+i]
			}
			t.column(func(i int) Op { return strided(RAX, R12, R13, R8, i) }, rows[r], temporary, c)
			if r < t.in-1 {
				ADDQ(R9, RAX)
			}
		}
		free := zmm[t.in*len(pass) : top]
		column := 0 // that R14 points at
		for _, o := range pass {
			for ; column < o; column++ {
				ADDQ(RDX, R14)
			}
			results := make([]VecPhysical, t.out)
			used := 0
			for i := range results {
				if from, ok := t.through[i]; ok {
					results[i] = rows[from][o]
					continue
				}
				results[i] = free[used]
				used++
			}
			t.column(func(i int) Op { return rows[i][o] }, results, temporary, c)
			for i, r := range results {
				if t.floor {
					VMAXPS(r, floor, r) // the second source is the answer where one is NaN
				}
				to := strided(R14, R10, R11, RBX, i)
				if t.add && (i < 2 || o < 2) {
					VADDPS(to, r, r)
				}
				VMOVUPS(r, to)
			}
		}
	}
	ADDQ(Imm(64), RSI)
	ADDQ(Imm(64), RDI)
	DECQ(RCX)
	JNZ(LabelRef("vector"))
	VZEROUPPER()
	RET()
}
