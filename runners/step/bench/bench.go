// Package bench is the command that measures how fast this machine hardens
// networks.
package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/temper-ml/temper/models/attack"
	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/nn/graph"
	"github.com/temper-ml/temper/models/nn/kernel"
	"github.com/temper-ml/temper/models/train"
	"github.com/temper-ml/temper/models/unknown"
	"github.com/temper-ml/temper/models/zoo"
	"github.com/temper-ml/temper/runners/step"
)

// Measurement is one line of the answer.
type Measurement struct {
	Network         string  `json:"network"`
	What            string  `json:"what"` // "attack", "train" or "infer"
	Path            string  `json:"path"` // one of kernel.Paths
	Batch           int     `json:"batch"`
	ImagesPerSecond float64 `json:"images_per_second"`
	GFLOPS          float64 `json:"gflops"`     // 10^9 operations a second, a multiply-add being two
	PeakShare       float64 `json:"peak_share"` // of kernel.Peak, measured by turns with it
}

// Command is the command.
func Command() *cobra.Command {
	var (
		networks, paths []string
		batches         []int
		seconds         float64
		processor       bool
	)
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure how fast this machine trains and attacks",
		Long: `Measure images per second of one attack step (attack: gradient of the input,
step along its sign, projection), one optimiser step (train: gradient of the
weights, Adam) and answers alone (infer), for each network, batch and kernel path,
fastest path first; portable, many times slower, on request or where it is the
only one. Answers are float32 on every path. Each figure is the best
of five rounds; its peak, that of the path's main instruction without memory
between the same rounds.`,
		Example: `  temper bench
  temper bench --network trades --batch 512 --path avx512 -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s := step.From(cmd)
			for _, p := range paths {
				if !slices.Contains(kernel.Paths(), p) {
					return step.BadInput(fmt.Errorf("--path: %w", unknown.Name("kernel path of this processor", p, kernel.Paths())))
				}
			}
			for _, b := range batches {
				if b < 1 || b > maxBatch {
					return step.BadInput(fmt.Errorf("--batch %d: must be 1 to %d", b, maxBatch))
				}
			}
			done, total := 0, len(networks)*len(batches)*len(paths)
			for _, name := range networks {
				d, err := zoo.LoadNetwork(name)
				if err != nil {
					return step.BadInput(err)
				}
				for _, batch := range batches {
					for _, path := range paths {
						work, err := prepare(d, path, batch)
						if err != nil {
							return err
						}
						for _, w := range work {
							m, err := w.measure(cmd.Context(), time.Duration(seconds*float64(time.Second)), processor)
							if err != nil {
								return err
							}
							m.Network, m.Path, m.Batch = name, path, batch
							text := fmt.Sprintf("%-8s %-6s %-10s %4d  %8.0f images/s  %7.1f GFLOP/s  %3.0f%% of peak", m.Network, m.What, m.Path, m.Batch, m.ImagesPerSecond, m.GFLOPS, 100*m.PeakShare)
							if err := s.PrintLine(text, m); err != nil {
								return err
							}
						}
						done++
						s.Progress(done, total)
					}
				}
			}
			return nil
		},
	}
	cmd.Flags().StringSliceVar(&networks, "network", []string{"wong", "paper", "trades"}, "networks of the zoo")
	all := kernel.Paths()
	cmd.Flags().StringSliceVar(&paths, "path", all[:max(1, len(all)-1)], "kernel paths, of this processor's "+strings.Join(all, ", "))
	cmd.Flags().IntSliceVar(&batches, "batch", []int{128, 512}, "images a step")
	step.Float(cmd.Flags(), &seconds, "seconds", 1, 0, 3600, "how long to measure each figure, at least")
	cmd.Flags().BoolVar(&processor, "cpu-time", false, "count seconds of this process's processors, not of the clock: where other processes run too")
	return cmd
}

// maxBatch bounds the memory of a run.
const maxBatch = 1 << 16

// measured is something to measure.
type measured struct {
	what, path string
	images     int
	operations float64 // of one step
	step       func() error
}

// rounds is how many times a figure is measured; the best one has been
// disturbed least.
const rounds = 5

// peakTime is long enough for all cores to work at once.
const peakTime = 20 * time.Millisecond

// measure takes at least the given time, and at least a step a round.
func (w measured) measure(ctx context.Context, duration time.Duration, processor bool) (Measurement, error) {
	defer kernel.Use(w.path)()
	begin := time.Now()
	clock := func() time.Duration { return time.Since(begin) }
	if processor {
		clock = processorTime
	}
	best, peak := 0.0, 0.0
	for i := range rounds + 1 { // the first fills caches and scratch memory
		start, n := clock(), 0
		for n == 0 || clock()-start < duration/rounds {
			if err := ctx.Err(); err != nil {
				return Measurement{}, err
			}
			if err := w.step(); err != nil {
				return Measurement{}, err
			}
			n++
			if i == 0 {
				break
			}
		}
		if i > 0 {
			best = max(best, float64(n)/(clock()-start).Seconds())
			peak = max(peak, kernel.Peak(w.path, peakTime, clock))
		}
	}
	gflops := best * w.operations / 1e9
	return Measurement{What: w.what, ImagesPerSecond: best * float64(w.images), GFLOPS: gflops, PeakShare: gflops / peak}, nil
}

// steps of an attack follow each other before the weights change, as in the recipe
// default.
const steps = 7

// prepare compiles a network with random weights for random images.
func prepare(d nn.Description, path string, batch int) ([]measured, error) {
	defer kernel.Use(path)()
	net, err := nn.New(d, 1)
	if err != nil {
		return nil, err
	}
	size, classes := net.Input.Size(), net.Classes()
	rng := rand.New(rand.NewPCG(1, 2))
	clean, labels := make([]float32, batch*size), make([]uint8, batch)
	for i := range clean {
		clean[i] = rng.Float32()
	}
	for i := range labels {
		labels[i] = uint8(rng.IntN(classes))
	}
	x := slices.Clone(clean)
	loss := attack.CrossEntropy(labels, classes)
	forward, first := operations(net)

	gradient, err := graph.NewFastAttack(net, batch)
	if err != nil {
		return nil, err
	}
	loop := attack.Loop{Model: gradient, Ball: attack.Linf(0.3), Alpha: 0.01}
	infer, err := graph.NewAttack(net, batch)
	if err != nil {
		return nil, err
	}
	training, err := graph.NewFastTraining(net, batch)
	if err != nil {
		return nil, err
	}
	adam := train.NewOptimiser(net.Flat())
	n := float64(batch)
	work := []measured{
		{"attack", path, batch * steps, n * steps * 2 * forward, func() error { return loop.Ascend(x, clean, batch, steps, loss) }},
		{"train", path, batch, n * (3*forward - first), func() error {
			_, err := training.Step(clean, batch, loss)
			adam.Step(training.Gradient(), 1/n, 1e-6)
			return err
		}},
	}
	if !kernel.HasBF16() { // answers are float32: they are those of the path below
		work = append(work, measured{"infer", path, batch, n * forward, func() error { _, err := infer.Logits(clean, batch); return err }})
	}
	return work, nil
}

// operations counts two for each multiply-add of convolutions and dense layers
// on one image: of all layers, and of the first. A gradient with respect to the
// inputs or to the weights of a layer takes as many as the layer itself.
func operations(net *nn.Network) (all, first float64) {
	for i := range net.Layers {
		w, _ := net.Weights(i)
		n := 2 * float64(len(w))
		if net.Layers[i].Conv != nil {
			out := net.LayerShapes()[i+1]
			n *= float64(out.Height * out.Width)
		}
		if all == 0 {
			first = n
		}
		all += n
	}
	return all, first
}
