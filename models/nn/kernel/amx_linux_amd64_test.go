package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"
)

// Few machines have AMX, so its path is tested on those that have AVX-512 too:
// TestAMX runs the tests of the path in a process of its own, traces it, and does
// what each tile instruction would have done when the processor refuses it.
// Everything else runs as it is: threads, signals, the garbage collector.

const emulated = "TEMPER_TEST_AMX"

var raced bool // the race detector is on

func init() {
	if os.Getenv(emulated) != "" {
		hasTiles, path = true, "amx"
	}
}

func TestAMX(t *testing.T) {
	switch have := available(); {
	case hasTiles:
		t.Skip("this processor has AMX: the other tests run it")
	case !slices.Contains(have, "avx512bf16"):
		t.Skip("the rest of the path needs AVX512_BF16")
	}
	tests := []string{
		"TestProductEqualsDefinition/^amx$",
		"TestProductStaysInItsOperands/^amx$",
		"TestReLUKeepsNaN/^amx$",
		"TestConcurrentUse/^amx$",
	}
	if !raced { // tracing a process with the race detector takes ten times as long
		tests = append(tests, "TestLayersEqualDefinition/bf16($|_true)/^amx$", "TestConvPoolEqualsItsParts/bf16/^amx$", "TestPairsEqualRounded/^amx$", "TestPeakIsMeasured")
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "output"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(os.Args[0], "-test.v", "-test.short", "-test.run", strings.Join(tests, "|"))
	cmd.Env = append(os.Environ(), emulated+"=1")
	cmd.Stdout, cmd.Stderr = out, out
	counts, err := trace(cmd)
	output, readErr := os.ReadFile(out.Name())
	if err != nil || readErr != nil {
		t.Fatalf("%v, %v\n%s", err, readErr, output)
	}
	for _, test := range tests {
		name, _, _ := strings.Cut(test, "/")
		passed := `(?m)^--- PASS: ` + name
		if strings.Contains(test, "amx") {
			passed = `(?m)^ +--- PASS: ` + name + `/(.*/)?amx `
		}
		if !regexp.MustCompile(passed).Match(output) {
			t.Errorf("no %s has passed:\n%s", test, output)
		}
	}
	for _, instruction := range []string{"LDTILECFG", "TILERELEASE", "TILEZERO", "TILELOADD", "TILESTORED", "TDPBF16PS"} {
		if counts[instruction] == 0 {
			t.Errorf("no %s was run", instruction)
		}
	}
	t.Log(counts)
}

// trace runs a command to its end and emulates what it does with tiles. It
// returns how often each instruction came; an error where the command fails, or
// does what a processor would not.
func trace(cmd *exec.Cmd) (counts map[string]int, err error) {
	runtime.LockOSThread() // the system knows a tracer by its thread
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	pid := cmd.Process.Pid
	defer cmd.Process.Release()
	defer func() {
		if err != nil {
			unix.Kill(pid, unix.SIGKILL)
			unix.Wait4(pid, nil, unix.WALL, nil)
		}
	}()
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil {
		return nil, err
	}
	if err := unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_EXITKILL); err != nil {
		return nil, err
	}
	counts = map[string]int{}
	threads := map[int]*thread{pid: {id: pid, pid: pid}}
	for stopped := pid; ; {
		signal := 0
		switch {
		case status.Exited() || status.Signaled():
			delete(threads, stopped)
			if stopped != pid {
				break
			}
			if status.ExitStatus() != 0 {
				return nil, fmt.Errorf("exit status %d, signal %v", status.ExitStatus(), status.Signal())
			}
			return counts, nil
		case threads[stopped] == nil: // a new thread starts stopped
			threads[stopped] = &thread{id: stopped, pid: pid}
		case status.StopSignal() == unix.SIGTRAP:
		case status.StopSignal() == unix.SIGILL:
			if err := threads[stopped].step(counts); err != nil {
				return nil, err
			}
		default:
			signal = int(status.StopSignal())
		}
		if status.Stopped() {
			if err := unix.PtraceCont(stopped, signal); err != nil && !errors.Is(err, unix.ESRCH) {
				return nil, err
			}
		}
		if stopped, err = unix.Wait4(-1, &status, unix.WALL|unix.WNOTHREAD, nil); err != nil {
			return nil, err
		}
	}
}

// thread is the state of the tiles of a traced thread, as Intel's manual (volume
// 1, chapter 18 and volume 2) has it.
type thread struct {
	id, pid     int
	configured  bool
	rows, words [8]int // of a row
	tile        [8][16][16]uint32
}

// step does the tile instructions that a thread has stopped at, up to the next
// one that is not, and counts them.
func (t *thread) step(counts map[string]int) error {
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(t.id, &regs); err != nil {
		return err
	}
	register := [16]uint64{
		regs.Rax, regs.Rcx, regs.Rdx, regs.Rbx, regs.Rsp, regs.Rbp, regs.Rsi, regs.Rdi,
		regs.R8, regs.R9, regs.R10, regs.R11, regs.R12, regs.R13, regs.R14, regs.R15,
	}
	code := make([]byte, 16)
	for first := true; ; first = false {
		if err := t.memory(unix.ProcessVMReadv, [][]byte{code}, regs.Rip, 0); err != nil {
			return err
		}
		if !first && (code[0] != 0xc4 || code[1]&0x1f != 2 || code[3] != 0x49 && code[3] != 0x4b && code[3] != 0x5c) {
			return unix.PtraceSetRegs(t.id, &regs)
		}
		name, length, err := t.instruction(code, register)
		if err != nil {
			return fmt.Errorf("% x: %s: %w", code, name, err)
		}
		counts[name]++
		regs.Rip += uint64(length)
	}
}

// instruction decodes and does one tile instruction. What it does not know, and
// what a processor would refuse, is an error.
func (t *thread) instruction(code []byte, register [16]uint64) (name string, length int, err error) {
	refused := func(what string) (string, int, error) { return name, 0, errors.New(what) }
	first, second, opcode, modrm := code[1], code[2], code[3], code[4]
	if code[0] != 0xc4 || first&0x1f != 2 || second&0x84 != 0 {
		return refused("not a tile instruction")
	}
	extension := func(bit int) int { return int(^first>>bit&1) << 3 }
	prefix, vvvv := second&3, int(^second>>3&15)
	reg, rm := int(modrm>>3&7)|extension(7), int(modrm&7)
	inMemory, sib := modrm>>6 != 3, rm == 4
	var address, stride uint64
	length = 5
	if inMemory {
		base := rm
		if sib {
			s := code[5]
			length++
			base = int(s & 7)
			if index := int(s>>3&7) | extension(6); index != 4 {
				stride = register[index] << (s >> 6)
			}
		}
		if modrm>>6 == 0 && base == 5 {
			return refused("an address without a base is not known here")
		}
		address = register[base|extension(5)]
		switch modrm >> 6 {
		case 1:
			address += uint64(int8(code[length]))
			length++
		case 2:
			address += uint64(int32(binary.LittleEndian.Uint32(code[length:])))
			length += 4
		}
	}
	valid := func(tile int) error {
		switch {
		case !t.configured:
			return errors.New("tiles are not configured")
		case tile > 7 || t.rows[tile] == 0:
			return fmt.Errorf("tile %d is not configured", tile)
		}
		return nil
	}
	move := func(call transfer, store bool) error {
		if err := valid(reg); err != nil {
			return err
		}
		rows := make([][]byte, t.rows[reg])
		for r := range rows {
			rows[r] = make([]byte, 4*t.words[reg])
			if store {
				binary.Encode(rows[r], binary.LittleEndian, t.tile[reg][r][:t.words[reg]])
			}
		}
		if err := t.memory(call, rows, address, stride); err != nil || store {
			return err
		}
		t.tile[reg] = [16][16]uint32{}
		for r := range rows {
			binary.Decode(rows[r], binary.LittleEndian, t.tile[reg][r][:t.words[reg]])
		}
		return nil
	}
	switch {
	case opcode == 0x49 && prefix == 0 && vvvv == 0 && inMemory && reg == 0:
		name, err = "LDTILECFG", t.configure(address)
	case opcode == 0x49 && prefix == 0 && vvvv == 0 && modrm == 0xc0:
		name = "TILERELEASE"
		*t = thread{id: t.id, pid: t.pid}
	case opcode == 0x49 && prefix == 3 && vvvv == 0 && !inMemory && rm == 0:
		name = "TILEZERO"
		if err = valid(reg); err == nil {
			t.tile[reg] = [16][16]uint32{}
		}
	case opcode == 0x4b && prefix == 3 && vvvv == 0 && inMemory && sib:
		name, err = "TILELOADD", move(unix.ProcessVMReadv, false)
	case opcode == 0x4b && prefix == 2 && vvvv == 0 && inMemory && sib:
		name, err = "TILESTORED", move(unix.ProcessVMWritev, true)
	case opcode == 0x5c && prefix == 2 && !inMemory:
		a, b := rm|extension(5), vvvv
		name, err = "TDPBF16PS", errors.Join(valid(reg), valid(a), valid(b))
		switch {
		case err != nil:
		case reg == a || reg == b || a == b:
			err = errors.New("the tiles are not three")
		case t.rows[a] != t.rows[reg] || t.words[b] != t.words[reg] || t.words[a] != t.rows[b]:
			err = fmt.Errorf("tiles of %d x %d, %d x %d and %d x %d", t.rows[reg], t.words[reg], t.rows[a], t.words[a], t.rows[b], t.words[b])
		default:
			multiply(&t.tile[reg], &t.tile[a], &t.tile[b], t.rows[reg], t.words[a], t.words[reg])
		}
	default:
		return refused("not an instruction known here")
	}
	return name, length, err
}

func (t *thread) configure(address uint64) error {
	config := make([]byte, 64)
	if err := t.memory(unix.ProcessVMReadv, [][]byte{config}, address, 0); err != nil {
		return err
	}
	*t = thread{id: t.id, pid: t.pid, configured: true}
	for i := range 8 {
		bytes := int(binary.LittleEndian.Uint16(config[16+2*i:]))
		t.rows[i], t.words[i] = int(config[48+i]), bytes/4
		if bytes > 64 || bytes%4 != 0 || t.rows[i] > 16 || (bytes == 0) != (t.rows[i] == 0) {
			return fmt.Errorf("tile %d of %d rows of %d bytes", i, t.rows[i], bytes)
		}
		clear(config[16+2*i : 18+2*i])
		config[48+i] = 0
	}
	if config[0] != 1 || slices.Max(config[1:]) != 0 {
		return fmt.Errorf("another palette, start row or reserved bytes: % x", config)
	}
	return nil
}

// transfer is ProcessVMReadv or ProcessVMWritev.
type transfer func(pid int, local []unix.Iovec, remote []unix.RemoteIovec, flags uint) (int, error)

// memory moves rows, the stride apart, from or to the traced process.
func (t *thread) memory(call transfer, rows [][]byte, address, stride uint64) error {
	var local []unix.Iovec
	var remote []unix.RemoteIovec
	for i, row := range rows {
		local = append(local, unix.Iovec{Base: &row[0], Len: uint64(len(row))})
		remote = append(remote, unix.RemoteIovec{Base: uintptr(address + uint64(i)*stride), Len: len(row)})
	}
	n, err := call(t.pid, local, remote, 0)
	if err == nil && n < len(rows)*len(rows[0]) {
		err = fmt.Errorf("memory at %#x, %d rows of %d bytes %#x apart: only %d bytes are there", address, len(rows), len(rows[0]), stride, n)
	}
	return err
}

// multiply is TDPBF16PS: the even and the odd products of a row of a and a column
// of b are added up apart, then to each other, then to c, each time rounded to the
// nearest, with all denormal numbers taken for 0.
//
//go:norace
func multiply(c, a, b *[16][16]uint32, rows, pairs, columns int) {
	value := func(half uint32) float64 { return flush(float64(math.Float32frombits(half << 16))) }
	for m := range rows {
		for n := range columns {
			even, odd := 0.0, 0.0
			for k := range pairs {
				// A product of two bfloat16 has 16 bits: it is exact, and so is its sum
				// with a float32 wherever that lies in the middle of two float32.
				even = flush(value(a[m][k]&0xffff)*value(b[k][n]&0xffff) + even)
				odd = flush(value(a[m][k]>>16)*value(b[k][n]>>16) + odd)
			}
			sum := flush(flush(float64(math.Float32frombits(c[m][n]))) + flush(even+odd))
			c[m][n] = math.Float32bits(float32(sum))
		}
	}
}

// flush rounds to float32, and what is below its least normal number, rounded as
// if there were smaller ones, to 0.
func flush(v float64) float64 {
	if math.Abs(v) < 0x1p-126-0x1p-151 {
		return math.Copysign(0, v)
	}
	return float64(float32(v))
}

// The product of two tiles is, bit for bit, what the processor's scalar
// instructions give (VFMADD231SS, ADDSS, with denormals taken for 0) in the order
// of Intel's manual: around 1, over the whole range, around the least normal
// number, of zeros, denormal numbers, infinities and NaN. A line of the file is
// rows, pairs and columns, then a, b, c and the result.
func TestMultiplyEqualsProcessor(t *testing.T) {
	data, err := os.ReadFile("testdata/tdpbf16ps.txt")
	if err != nil {
		t.Fatal(err)
	}
	for n, line := range strings.Split(strings.TrimSpace(string(data)), "\n") {
		words := strings.Fields(line)
		size := func() int {
			v, err := strconv.Atoi(words[0])
			if err != nil || v > 16 {
				t.Fatalf("line %d: size %q", n+1, words[0])
			}
			words = words[1:]
			return v
		}
		rows, pairs, columns := size(), size(), size()
		var a, b, c, want [16][16]uint32
		read := func(tile *[16][16]uint32, rows, columns int) {
			for i := range rows * columns {
				v, err := strconv.ParseUint(words[i], 16, 32)
				if err != nil {
					t.Fatal(err)
				}
				tile[i/columns][i%columns] = uint32(v)
			}
			words = words[rows*columns:]
		}
		read(&a, rows, pairs)
		read(&b, pairs, columns)
		read(&c, rows, columns)
		read(&want, rows, columns)
		multiply(&c, &a, &b, rows, pairs, columns)
		nan := func(v uint32) bool { return v&0x7fffffff > 0x7f800000 } // of any kind
		for i := range rows {
			for j := range columns {
				if c[i][j] != want[i][j] && !(nan(c[i][j]) && nan(want[i][j])) {
					t.Errorf("line %d, %d x %d x %d, at %d, %d: %08x, the processor has %08x", n+1, rows, pairs, columns, i, j, c[i][j], want[i][j])
				}
			}
		}
	}
}

// The emulator refuses what a processor refuses, and what it does not know.
func TestEmulatorRefuses(t *testing.T) {
	for _, code := range []string{
		"\x0f\x0b",                     // UD2
		"\xc4\xe2\x7b\x49\xc0",         // TILEZERO without a configuration
		"\xc4\xe2\x7b\x4b\x04\x0e",     // TILELOADD too
		"\xc4\xe2\x7a\x5c\xc1",         // TDPBF16PS of tiles 0, 1, 0
		"\xc4\xe2\x79\x4b\x04\x0e",     // TILELOADDT1, which is not used
		"\xc4\xe2\x7b\x5e\xc1",         // TDPBSSD
		"\xc4\xe2\xfa\x5c\xc1",         // W
		"\xc4\xe2\x7e\x5c\xc1",         // 256 bits
		"\xc4\xe2\x7b\x4b\x06",         // no index
		"\xc4\xe2\x78\x49\x05\x00\x00", // an address after the instruction
	} {
		th := thread{id: os.Getpid(), pid: os.Getpid()}
		if name, _, err := th.instruction(append([]byte(code), make([]byte, 16)...), [16]uint64{}); err == nil {
			t.Errorf("% x: %s was done", code, name)
		}
	}
}

// A processor without AMX is not asked for it; where the system says no, another
// path is taken.
func TestAMXIsPermitted(t *testing.T) {
	asked := 0
	ask := func(err error) func() error { return func() error { asked++; return err } }
	if permitted(false, ask(nil)) || asked > 0 {
		t.Error("a processor without AMX was asked")
	}
	if !permitted(true, ask(nil)) || permitted(true, ask(unix.EOPNOTSUPP)) || asked != 2 {
		t.Error("the answer was not heeded")
	}
	if err := permitTiles(); err == nil && !cpu.X86.HasAMXTile {
		t.Error("Linux permits what the processor does not have")
	}
}
