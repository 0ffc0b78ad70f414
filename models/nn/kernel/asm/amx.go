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
	tilesScratch
	tilesOut
	tilesBeside // mask or places, of the same shape as out
	tilesOutRow
	tilesBesideRow
	tilesOutLine
	tilesBesideLine
	tilesFloor
	tilesRows  // of a block, or windows
	tilesBelow // from a row of the first line to the same of the second
	tilesOutAt // of the block: the micro-kernel's own, as the next two
	tilesBesideAt
	tilesLinesLeft
	tilesSize
)

// finish is what becomes of a block of c, up to 32 x 32.
type finish int

const (
	stored  finish = iota
	rounded        // to pairs, with a bias, at least floor
	masked         // the same, 0 where a mask is not positive
	pooled         // windows of 2 x 2 of two lines
)

func (f finish) String() string { return []string{"", "_rounded", "_masked", "_pooled"}[f] }

// each is how many rows or windows of the block before are finished beside each step
// of a product: AVX-512 has nothing else to do then.
func (f finish) each() int { return []int{0, 8, 8, 1}[f] }

// tiles writes the micro-kernel for rows x columns tiles of c.
func tiles(rows, columns int, end finish) {
	TEXT(fmt.Sprintf("amx_%dx%d%v", rows, columns, end), NOSPLIT, fmt.Sprintf("func(t *[%d]uintptr)", tilesSize/8))
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
	XORQ(R13, R13) // bytes of the columns that are done
	drain := func(string) {}
	row := func() {}
	if end == stored {
		MOVQ(field(tilesCRow), R10)
	} else {
		row, drain = finishing(end, field)
		XORQ(R10, R10) // rows of the block before that are left
	}

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
	drain("strip")
	start(tilesA, tilesAAt)
	start(tilesBStart, tilesBAt)
	start(tilesLines, tilesLinesLeft)
	if end == stored {
		start(tilesC, tilesCAt)
		ADDQ(R13, field(tilesCAt))
	} else {
		MOVQ(field(tilesBias), RAX)
		VMOVUPS(Mem{Base: RAX, Index: R13, Scale: 1}, Z8)
		VMOVUPS(Mem{Base: RAX, Index: R13, Scale: 1, Disp: 64}, Z9)
		// A pair has half the size of a value, a place a quarter.
		MOVQ(R13, RAX)
		SHRQ(Imm(1), RAX)
		MOVQ(field(tilesOut), RCX)
		ADDQ(RAX, RCX)
		MOVQ(RCX, field(tilesOutAt))
		if end == pooled {
			SHRQ(Imm(1), RAX)
		}
		MOVQ(field(tilesBeside), RCX)
		ADDQ(RAX, RCX)
		MOVQ(RCX, field(tilesBesideAt))
	}

	Label("line")
	if end == stored {
		Comment("the tiles start as c, as the bias, or as zero")
		MOVQ(field(tilesStart), RCX)
		CMPQ(RCX, Imm(1))
		JEQ(LabelRef("add"))
		JA(LabelRef("bias"))
	}
	for r := range rows {
		for v := range columns {
			vex(3, 0x49, c(r, v), 0, 0xc0) // TILEZERO
		}
	}
	if end == stored {
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
	}

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
	for range end.each() {
		TESTQ(R10, R10)
		JZ(LabelRef("beside"))
		row()
	}
	if end != stored {
		Label("beside")
	}
	advance(tilesAStep, tilesBStep)
	DECQ(RCX)
	JNZ(LabelRef("step"))
	advance(tilesANext, tilesBNext)
	DECQ(RDX)
	JNZ(LabelRef("segment"))

	drain("line")
	if end == stored {
		locate()
	} else {
		MOVQ(U64(64*2), RCX)
		MOVQ(field(tilesScratch), R11)
		MOVQ(field(tilesBelow), R15)
		ADDQ(R11, R15)
		cBase = []GPPhysical{R11, R15}
	}
	for r := range rows {
		for v := range columns {
			stride := R10
			if end != stored {
				stride = RCX
			}
			tileStore(c(r, v), cBase[r], stride, 64*v)
		}
	}
	if end == stored {
		add(tilesCLine, tilesCAt)
	} else {
		MOVQ(field(tilesRows), R10)
		MOVQ(field(tilesBesideAt), R14)
		add(tilesBesideLine, tilesBesideAt)
		add(tilesOutLine, tilesOutAt)
		MOVQ(field(tilesOutAt), RAX)
		SUBQ(field(tilesOutLine), RAX)
	}
	MOVQ(field(tilesALine), RCX)
	ADDQ(RCX, field(tilesAAt))
	MOVQ(field(tilesBLine), RCX)
	ADDQ(RCX, field(tilesBAt))
	DECQ(field(tilesLinesLeft))
	JNZ(LabelRef("line"))
	MOVQ(field(tilesBStrip), RCX)
	ADDQ(RCX, field(tilesBStart))
	ADDQ(U32(64*columns), R13)
	CMPQ(R13, field(tilesWidth))
	JLT(LabelRef("strip"))
	drain("end")
	vex(0, 0x49, 0, 0, 0xc0) // TILERELEASE
	if end != stored {
		VZEROUPPER()
	}
	RET()
}

// finishing writes what the rows of a block need, of which R10 counts those left: R11
// and R15 are where they lie, RAX and R14 where they go. It returns what writes one of
// them, and a loop for all that are left.
func finishing(end finish, field func(int) Mem) (row func(), drain func(label string)) {
	VBROADCASTSS(field(tilesFloor), Z3)
	VPXORD(Z10, Z10, Z10)
	row = func() {
		VMOVUPS(Mem{Base: R11}, Z0)
		VMOVUPS(Mem{Base: R11, Disp: 64}, Z1)
		VADDPS(Z8, Z0, Z0)
		VADDPS(Z9, Z1, Z1)
		VMAXPS(Z0, Z3, Z0) // the second source is the answer where one is NaN
		VMAXPS(Z1, Z3, Z1)
		roundTwo(0, 1, 2)
		if end == masked {
			VMOVDQU16(Mem{Base: R14}, Z5)
			VPCMPGTW(Z10, Z5, K4) // what is negative has its sign set
			VMOVDQU16_Z(Z2, K4, Z2)
			ADDQ(field(tilesBesideRow), R14)
		}
		VMOVUPS(Z2, Mem{Base: RAX})
		ADDQ(Imm(128), R11)
		ADDQ(field(tilesOutRow), RAX)
		DECQ(R10)
	}
	if end == pooled {
		taken()
		row = func() {
			for v := range 2 {
				window([]Mem{{Base: R11, Disp: 64 * v}, {Base: R11, Disp: 128 + 64*v}, {Base: R15, Disp: 64 * v}, {Base: R15, Disp: 128 + 64*v}},
					Mem{Base: RAX, Disp: 32 * v}, Mem{Base: R14, Disp: 16 * v}, zmm[8+v])
			}
			ADDQ(U32(256), R11)
			ADDQ(U32(256), R15)
			ADDQ(field(tilesOutRow), RAX)
			ADDQ(field(tilesBesideRow), R14)
			DECQ(R10)
		}
	}
	drain = func(label string) {
		Label("drain_" + label)
		TESTQ(R10, R10)
		JZ(LabelRef("drained_" + label))
		row()
		JMP(LabelRef("drain_" + label))
		Label("drained_" + label)
	}
	return row, drain
}

// taken sets registers to the places of a maximum in its window: Z10 to Z13 to 0 to 3,
// Z14 to none.
func taken() {
	VPXORD(Z10, Z10, Z10)
	for tap := 1; tap < 4; tap++ {
		MOVQ(U64(uint64(tap)), RAX)
		VPBROADCASTD(EAX, zmm[10+tap])
	}
	VPTERNLOGD(Imm(0xff), Z14, Z14, Z14)
}

// window writes the pool of 16 channels of a window: the maximum, with a bias and
// clamped, as pairs to y, and its place to which, of registers Z10 to Z13, or Z14 if it
// is not positive.
func window(taps []Mem, y, which Mem, bias VecPhysical) {
	VMOVUPS(taps[0], Z0)
	VMOVDQA32(Z10, Z1)
	for tap := 1; tap < 4; tap++ {
		VMOVUPS(taps[tap], Z2)
		VCMPPS(Imm(0x1e), Z0, Z2, K1) // larger, ordered
		VCMPPS(Imm(0x03), Z2, Z2, K2) // NaN
		KORW(K1, K2, K1)
		VMOVAPS(Z2, K1, Z0)
		VMOVDQA32(zmm[10+tap], K1, Z1)
	}
	if bias != nil {
		VADDPS(bias, Z0, Z0)
	}
	VCMPPS(Imm(0x1a), Z10, Z0, K1) // not larger than 0, or NaN
	VMOVDQA32(Z14, K1, Z1)
	VMAXPS(Z0, Z10, Z0) // the second source is the answer where one is NaN
	roundOne(0, 0)
	VMOVDQU(Y0, y)
	VPMOVDB(Z1, which)
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
