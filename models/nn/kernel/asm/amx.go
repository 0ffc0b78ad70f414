package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// The AMX micro-kernel keeps rows x columns tiles of c in tile registers, each
// up to 16 x 16. A tile of a is up to 16 rows of 16 pairs, one of b up to 16
// pairs (rows) of 16 columns, and TDPBF16PS adds the product of the two to one
// of c, up to 8192 multiply-adds. It starts one every 16 cycles, as many as a has
// rows, and a load of aligned rows takes half of that: 2 x 2 tiles of c need four
// loads for four products, 1 x 4, for few rows, five.
//
// Tiles are configured, used and released in one function, which Go does not
// preempt: what the operating system keeps of a thread between two of them has
// no tiles in it. That costs as much as ten products, so one call does many lines:
// products whose operands lie a line further each time, all of a strip of b before
// the next.

// Offsets in type tiles of package kernel, after the configuration.
const (
	tilesA = 64 + 8*iota
	tilesB
	tilesC
	tilesBias
	tilesStart
	tilesSegments
	tilesSteps
	tilesARow
	tilesAStep
	tilesANext
	tilesASecond
	tilesBRow
	tilesBStep
	tilesBNext
	tilesBStrip
	tilesCRow
	tilesCSecond
	tilesWidth
	tilesLines
	tilesALine
	tilesBLine
	tilesCLine
	tilesAAt // of the line in work: the micro-kernel's own, as the next three
	tilesBAt
	tilesCAt
	tilesBStart // of the strip
	tilesSize
)

// tiles writes the micro-kernel for rows x columns tiles of c.
func tiles(rows, columns int) {
	TEXT(fmt.Sprintf("amx_%dx%d", rows, columns), NOSPLIT, fmt.Sprintf("func(t *[%d]uintptr)", tilesSize/8))
	Pragma("noescape")
	field := func(off int) Mem { return Mem{Base: RDI, Disp: off} }
	// Tiles 0 to 3 are of c, the others of a and b.
	c := func(r, v int) int { return r*columns + v }
	a := func(r int) int { return 4 + r }
	b := func(v int) int { return 4 + rows + v%(4-rows) }
	aBase, cBase := []GPPhysical{RSI, R12}, []GPPhysical{R11, RAX}
	locate := func() { // the places of c
		MOVQ(field(tilesCAt), R11)
		if rows > 1 {
			MOVQ(field(tilesCSecond), RAX)
			ADDQ(R11, RAX)
		}
	}

	Load(Param("t"), RDI)
	vex(0, 0x49, 0, 0, 0x07) // LDTILECFG (RDI)
	MOVQ(field(tilesARow), R8)
	MOVQ(field(tilesBRow), R9)
	MOVQ(field(tilesCRow), R10)
	XORQ(R13, R13) // bytes of the columns that are done

	add := func(a, sum int) {
		MOVQ(field(a), RAX)
		ADDQ(RAX, field(sum))
	}
	start := func(of, at int) {
		MOVQ(field(of), RAX)
		MOVQ(RAX, field(at))
	}
	start(tilesB, tilesBStart)
	Label("strip")
	start(tilesA, tilesAAt)
	start(tilesBStart, tilesBAt)
	start(tilesC, tilesCAt)
	ADDQ(R13, field(tilesCAt))
	MOVQ(field(tilesLines), R14)

	Label("line")
	Comment("the tiles start as c, as the bias, or as zero")
	MOVQ(field(tilesStart), RCX)
	CMPQ(RCX, Imm(1))
	JEQ(LabelRef("add"))
	JA(LabelRef("bias"))
	for r := range rows {
		for v := range columns {
			vex(3, 0x49, c(r, v), 0, 0xc0) // TILEZERO
		}
	}
	JMP(LabelRef("started"))
	Label("add")
	locate()
	for r := range rows {
		for v := range columns {
			tileLoad(c(r, v), cBase[r], R10, 64*v)
		}
	}
	JMP(LabelRef("started"))
	Label("bias")
	MOVQ(field(tilesBias), RAX)
	ADDQ(R13, RAX)
	XORQ(RCX, RCX) // all rows of a tile from one place
	for r := range rows {
		for v := range columns {
			tileLoad(c(r, v), RAX, RCX, 64*v)
		}
	}

	Label("started")
	MOVQ(field(tilesAAt), RSI)
	if rows > 1 {
		MOVQ(field(tilesASecond), R12)
		ADDQ(RSI, R12)
	}
	MOVQ(field(tilesBAt), RBX)
	MOVQ(field(tilesSegments), RDX)
	advance := func(a, b int) {
		for _, base := range aBase[:rows] {
			ADDQ(field(a), base)
		}
		ADDQ(field(b), RBX)
	}
	Label("segment")
	MOVQ(field(tilesSteps), RCX)
	Label("step")
	for r := range rows {
		tileLoad(a(r), aBase[r], R8, 0)
	}
	for v := range columns {
		tileLoad(b(v), RBX, R9, 64*v)
		for r := range rows {
			tileProduct(a(r), b(v), c(r, v))
		}
	}
	advance(tilesAStep, tilesBStep)
	DECQ(RCX)
	JNZ(LabelRef("step"))
	advance(tilesANext, tilesBNext)
	DECQ(RDX)
	JNZ(LabelRef("segment"))

	locate()
	for r := range rows {
		for v := range columns {
			tileStore(c(r, v), cBase[r], R10, 64*v)
		}
	}
	add(tilesALine, tilesAAt)
	add(tilesBLine, tilesBAt)
	add(tilesCLine, tilesCAt)
	DECQ(R14)
	JNZ(LabelRef("line"))
	add(tilesBStrip, tilesBStart)
	ADDQ(U32(64*columns), R13)
	CMPQ(R13, field(tilesWidth))
	JLT(LabelRef("strip"))
	vex(0, 0x49, 0, 0, 0xc0) // TILERELEASE
	RET()
}

// peakTiles writes the loop that measures the peak: six tiles that wait for
// nothing but themselves.
func peakTiles() {
	whole := GLOBL("wholeTiles", RODATA|NOPTR)
	DATA(0, U64(1))
	for i := range 7 {
		v := uint64(0)
		switch i {
		case 1, 2: // 64 bytes in a row
			v = 0x0040_0040_0040_0040
		case 5: // 16 rows
			v = 0x1010_1010_1010_1010
		}
		DATA(8*(i+1), U64(v))
	}
	TEXT("peakAMX", NOSPLIT, "func(n int)")
	Pragma("noescape")
	Doc("peakAMX does n times 6 products of whole tiles.")
	Load(Param("n"), RCX)
	LEAQ(whole, RDI)
	vex(0, 0x49, 0, 0, 0x07)
	for i := range 8 {
		vex(3, 0x49, i, 0, 0xc0)
	}
	Label("loop")
	for i := range 6 {
		tileProduct(6, 7, i)
	}
	DECQ(RCX)
	JNZ(LabelRef("loop"))
	vex(0, 0x49, 0, 0, 0xc0)
	RET()
}

// tileLoad writes TILELOADD: rows of tile to, the stride apart.
func tileLoad(to int, base, stride GPPhysical, disp int) { tileMemory(3, to, base, stride, disp) }

// tileStore writes TILESTORED.
func tileStore(from int, base, stride GPPhysical, disp int) {
	tileMemory(2, from, base, stride, disp)
}

func tileMemory(prefix, tile int, base, stride GPPhysical, disp int) {
	x, b := int(stride.(Physical).PhysicalIndex()), int(base.(Physical).PhysicalIndex())
	// An address of base, stride and 4 bytes; registers from 8 on by the bits
	// after the prefix.
	raw("LONG", 0xc4|(0xe2&^(x>>3<<6)&^(b>>3<<5))<<8|(0x78|prefix)<<16|0x4b<<24)
	raw("WORD", 0x84|tile<<3|(x&7<<3|b&7)<<8)
	raw("LONG", disp)
}

// tileProduct writes TDPBF16PS, which adds the product of tiles a and b to sum.
func tileProduct(a, b, sum int) { vex(2, 0x5c, sum, b, 0xc0|a) }

// vex writes an instruction of the map 0F38 of 128 bits without a width: prefix
// (0: none, 1: 66, 2: F3, 3: F2) and opcode from the instruction's table, a
// register in the field reg and one in the field vvvv, and the rest of ModRM.
func vex(prefix, opcode, reg, vvvv, modrm int) {
	raw("LONG", 0xc4|0xe2<<8|((^vvvv&15)<<3|prefix)<<16|opcode<<24)
	raw("BYTE", modrm|reg<<3)
}

// turns writes the transpose of a block of words, by four rounds of exchanging
// ever larger parts between 16 vectors.
func turns() {
	TEXT("transposeBlock", NOSPLIT, "func(dst, src *float32, rows, columns, dstRow, srcRow int)")
	Pragma("noescape")
	Doc("transposeBlock writes the transpose of rows x columns words, 1 to 16 each, whose rows are srcRow bytes apart, to rows dstRow bytes apart.")
	Load(Param("dst"), RDI)
	Load(Param("src"), RSI)
	Load(Param("rows"), R10)
	Load(Param("columns"), R11)
	Load(Param("dstRow"), R8)
	Load(Param("srcRow"), R9)
	bits(R11, K1)
	bits(R10, K2)
	from, to := zmm[:16], zmm[16:]
	for i, r := range from {
		VMOVUPS_Z(Mem{Base: RSI}, K1, r)
		if i < 15 { // what the others hold is not stored
			DECQ(R10)
			JZ(LabelRef("loaded"))
			ADDQ(R9, RSI)
		}
	}
	Label("loaded")
	for i := 0; i < 16; i += 2 {
		VUNPCKLPS(from[i+1], from[i], to[i])
		VUNPCKHPS(from[i+1], from[i], to[i+1])
	}
	from, to = to, from
	for i := 0; i < 16; i += 4 {
		for j := range 2 {
			VUNPCKLPD(from[i+j+2], from[i+j], to[i+2*j])
			VUNPCKHPD(from[i+j+2], from[i+j], to[i+2*j+1])
		}
	}
	from, to = to, from
	for i := 0; i < 16; i += 8 {
		for j := range 4 {
			VSHUFF32X4(Imm(0x88), from[i+j+4], from[i+j], to[i+j])
			VSHUFF32X4(Imm(0xdd), from[i+j+4], from[i+j], to[i+j+4])
		}
	}
	from, to = to, from
	for j := range 8 {
		VSHUFF32X4(Imm(0x88), from[j+8], from[j], to[j])
		VSHUFF32X4(Imm(0xdd), from[j+8], from[j], to[j+8])
	}
	for i, r := range to {
		VMOVUPS(r, K2, Mem{Base: RDI})
		if i < 15 {
			DECQ(R11)
			JZ(LabelRef("stored"))
			ADDQ(R8, RDI)
		}
	}
	Label("stored")
	VZEROUPPER()
	RET()
}
