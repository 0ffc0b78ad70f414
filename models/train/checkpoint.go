package train

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
)

// A checkpoint file is magic, the length of the head (4 bytes), the head as
// JSON, the vectors as float32 (the current weights, m, v and moving average,
// then those to roll back to, then the best weights), and the SHA-256 of all that; numbers are
// little-endian.
const (
	magic = "TEMPERC1"
	// maxHead bounds the head: its only list is that of maxRollbacks, with less
	// than 300 bytes for each.
	maxHead = 1 << 20
)

// head is the small part of a checkpoint.
type head struct {
	Origin       origin     `json:"origin"`
	Step         int        `json:"step"`    // steps done
	Updates      int        `json:"updates"` // optimiser steps that Weights have seen
	Best         float64    `json:"best"`    // the guard's: see guard
	Rescued      bool       `json:"rescued"`
	Rollbacks    []Rollback `json:"rollbacks,omitempty"`
	GoodStep     int        `json:"good_step"`
	GoodUpdates  int        `json:"good_updates"`
	Loss         float64    `json:"loss"` // sum over this epoch's steps
	LastLoss     float64    `json:"last_loss"`
	Parameters   int        `json:"parameters"`
	Guard        bool       `json:"guard"`
	KeepBest     bool       `json:"keep_best"`
	BestStep     int        `json:"best_step"` // see best
	BestAccuracy float64    `json:"best_accuracy"`
}

// origin is what a training grows from: a checkpoint of one resumes no other.
// The fields but Kernel are digests.
type origin struct {
	Network    string `json:"network"`
	Weights    string `json:"weights"` // before the first step
	Recipe     string `json:"recipe"`
	Threat     string `json:"threat"`
	Seed       string `json:"seed"`
	Train      string `json:"train"`
	Validation string `json:"validation"`
	Kernel     string `json:"kernel"` // path of models/nn/kernel, on which the bits depend
}

// differs names what of the origin is different, "" where nothing is.
func (o origin) differs(p origin) string {
	for _, f := range []struct{ name, a, b string }{
		{"network", o.Network, p.Network}, {"recipe", o.Recipe, p.Recipe}, {"threat model", o.Threat, p.Threat},
		{"seed", o.Seed, p.Seed}, {"training data", o.Train, p.Train}, {"validation data", o.Validation, p.Validation},
		{"starting weights", o.Weights, p.Weights},
		{fmt.Sprintf("instruction set (TEMPER_KERNEL=%s, now %s)", o.Kernel, p.Kernel), o.Kernel, p.Kernel},
	} {
		if f.a != f.b {
			return f.name
		}
	}
	return ""
}

// digest is of a value's JSON; NaN, which has none, is refused before.
func digest(v any) string {
	data, err := json.Marshal(v)
	if err != nil {
		panic("train: " + err.Error()) // plain structs of numbers and strings
	}
	return hexSum(data)
}

func hexSum(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// encode lays a checkpoint out as a file's content.
func encode(h head, vectors [][]float32) ([]byte, error) {
	data, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(data) > maxHead {
		return nil, fmt.Errorf("checkpoint: a head of %d bytes: at most %d", len(data), maxHead)
	}
	out := make([]byte, 0, len(magic)+4+len(data)+vectorBytes(h)+sha256.Size)
	out = append(out, magic...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(data)))
	out = append(out, data...)
	out = appendFloats(out, vectors)
	sum := sha256.Sum256(out)
	return append(out, sum[:]...), nil
}

func appendFloats(out []byte, vectors [][]float32) []byte {
	for _, v := range vectors {
		for _, f := range v {
			out = binary.LittleEndian.AppendUint32(out, math.Float32bits(f))
		}
	}
	return out
}

// vectorBytes is the size of the vectors that a head announces.
func vectorBytes(h head) int {
	vectors := 4
	if h.Guard {
		vectors *= 2
	}
	if h.KeepBest {
		vectors++
	}
	return 4 * vectors * h.Parameters
}

var errDamaged = errors.New("the file is damaged or no checkpoint: delete it to start afresh")

// decode reads a checkpoint into vectors, whose number and lengths it must
// match; want holds the parts of the head that must be as they are now, total
// the number of steps of the training.
func decode(data []byte, want head, total int, vectors [][]float32) (head, error) {
	var h head
	if len(data) < len(magic)+4+sha256.Size || string(data[:len(magic)]) != magic {
		return h, errDamaged
	}
	body, sum := data[:len(data)-sha256.Size], data[len(data)-sha256.Size:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) {
		return h, errDamaged
	}
	rest := body[len(magic):]
	n := binary.LittleEndian.Uint32(rest)
	if rest = rest[4:]; n > maxHead || int(n) > len(rest) {
		return h, errDamaged
	}
	d := json.NewDecoder(bytes.NewReader(rest[:n]))
	d.DisallowUnknownFields()
	if err := d.Decode(&h); err != nil {
		return h, fmt.Errorf("%w (%v)", errDamaged, err)
	}
	if what := h.Origin.differs(want.Origin); what != "" {
		return h, fmt.Errorf("it belongs to a training with another %s: delete it or choose another file", what)
	}
	if rest = rest[n:]; h.Parameters != want.Parameters || h.Guard != want.Guard || h.KeepBest != want.KeepBest || len(rest) != vectorBytes(want) {
		return h, errDamaged
	}
	if h.Step < 0 || h.Step > total || h.Updates < 0 || h.Updates > h.Step || h.GoodStep < 0 || h.GoodStep > h.Step || h.GoodUpdates < 0 || h.GoodUpdates > h.GoodStep || h.BestStep < 0 || h.BestStep > h.Step {
		return h, errDamaged
	}
	for _, v := range vectors {
		for i := range v {
			v[i] = math.Float32frombits(binary.LittleEndian.Uint32(rest))
			rest = rest[4:]
		}
	}
	return h, nil
}

// read returns the content of a checkpoint file, nil where there is none. It
// reads no more than a file of that many bytes of vectors can have.
func read(path string, vectors int) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	most := int64(len(magic) + 4 + maxHead + vectors + sha256.Size)
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = errDamaged
	}
	return data, err
}

// write puts data at path in one move: after a crash the file is either the
// old or the new one.
func write(path string, data []byte) (err error) {
	temporary := path + ".tmp"
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(temporary)
		}
	}()
	if _, err = f.Write(data); err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		return err
	}
	folder, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync() // makes the new name durable
}
