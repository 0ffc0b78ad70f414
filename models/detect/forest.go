package detect

import (
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"sort"
	"strconv"

	"github.com/sjwhitworth/golearn/base"
	"github.com/sjwhitworth/golearn/trees"
	"golang.org/x/sync/errgroup"
)

// Forest fuses the signals into one score: trees that were each grown on a
// sample, drawn with replacement, of requests that were known to be hostile or
// not (bagging: Breiman 1996). Trees see bins of the signals' values, so no
// signal's scale matters.
type Forest struct {
	Edges [][]float64 `json:"edges"` // of each signal: the bins' rising upper bounds, the last bin has none
	Trees [][]Node    `json:"trees"` // each begins with its root
}

// Node asks for the bin of one signal.
type Node struct {
	Signal   int     `json:"s"`
	Children []int   `json:"c,omitempty"` // by bin: a later node of the tree, or 0 where training saw none; none for a leaf
	Hostile  float64 `json:"h"`           // share of hostile requests among those that came here in training
}

const (
	treeCount = 40
	binCount  = 16
	// maxTrees and maxNodes bound a forest that is read from a file.
	maxTrees = 256
	maxNodes = 1 << 16
	maxBins  = 256
)

// grow trains a forest on rows of signals. The same rows give the same forest.
func grow(rows [][signalCount]float64, hostile []bool) (*Forest, error) {
	f := &Forest{}
	values := make([]float64, len(rows))
	for k := range signalCount {
		for i := range rows {
			values[i] = rows[i][k]
		}
		slices.Sort(values)
		edges := []float64{}
		for b := 1; b < binCount; b++ {
			if v := values[b*len(values)/binCount]; len(edges) == 0 || v > edges[len(edges)-1] {
				edges = append(edges, v)
			}
		}
		f.Edges = append(f.Edges, edges)
	}
	rng := rand.New(rand.NewPCG(1, treeCount))
	f.Trees = make([][]Node, treeCount)
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for t := range f.Trees {
		drawn := make([]int, len(rows))
		for i := range drawn {
			drawn[i] = rng.IntN(len(rows))
		}
		group.Go(func() (err error) {
			f.Trees[t], err = f.tree(t, rows, hostile, drawn)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return f, nil
}

// tree grows one on the rows that were drawn for it.
func (f *Forest) tree(number int, rows [][signalCount]float64, hostile []bool, drawn []int) ([]Node, error) {
	data := base.NewDenseInstances()
	class := categories("hostile", 2)
	specs := make([]base.AttributeSpec, signalCount)
	for k := range specs {
		specs[k] = data.AddAttribute(categories(strconv.Itoa(k), len(f.Edges[k])+1))
	}
	at := data.AddAttribute(class)
	if err := data.AddClassAttribute(class); err != nil {
		return nil, err
	}
	if err := data.Extend(len(drawn)); err != nil {
		return nil, err
	}
	for i, row := range drawn {
		for k, spec := range specs {
			data.Set(spec, i, base.PackU64ToBytes(uint64(f.bin(k, rows[row][k]))))
		}
		label := uint64(0)
		if hostile[row] {
			label = 1
		}
		data.Set(at, i, base.PackU64ToBytes(label))
	}
	tree := []Node{}
	flatten(&tree, trees.InferID3Tree(data, informationGain(number)))
	return tree, nil
}

// categories is an attribute with the values 0 to n-1, in this order.
func categories(name string, n int) *base.CategoricalAttribute {
	a := base.NewCategoricalAttribute()
	a.SetName(name)
	for v := range n {
		a.GetSysValFromString(strconv.Itoa(v))
	}
	return a
}

// informationGain is golearn's rule of the same name, except that each split
// considers only some of the signals, so that the trees differ (random
// forests: Breiman 2001). What it draws and sums does not depend on the order
// in which golearn visits the nodes, which is that of a map. It is the number
// of the tree.
type informationGain uint64

// consideredSignals is about the usual two thirds.
const consideredSignals = 6

func (tree informationGain) GenerateSplitRule(data base.FixedDataGrid) *trees.DecisionTreeRule {
	candidates := base.AttributeDifferenceReferences(data.AllAttributes(), data.AllClassAttributes())
	sort.Slice(candidates, func(i, j int) bool { return candidates[i].GetName() < candidates[j].GetName() })
	_, rows := data.Size()
	seed := uint64(rows)
	for _, a := range candidates {
		k, _ := strconv.Atoi(a.GetName())
		seed = seed<<4 | uint64(k)
	}
	rng := rand.New(rand.NewPCG(uint64(tree), seed))
	rng.Shuffle(len(candidates), func(i, j int) { candidates[i], candidates[j] = candidates[j], candidates[i] })
	var best base.Attribute
	least := math.Inf(1)
	for _, a := range candidates[:min(len(candidates), consideredSignals)] {
		split := base.GetClassDistributionAfterSplit(data, a)
		if len(split) < 2 {
			continue
		}
		sum := 0.0
		for v := range binCount {
			d := split[strconv.Itoa(v)]
			sum += entropy(d["0"], d["1"])
		}
		if sum < least {
			best, least = a, sum
		}
	}
	if best == nil {
		return nil
	}
	return &trees.DecisionTreeRule{SplitAttr: best}
}

// entropy of a group of a and b members, times its size.
func entropy(a, b int) float64 {
	sum := 0.0
	for _, n := range []int{a, b} {
		if n > 0 {
			sum -= float64(n) * math.Log(float64(n)/float64(a+b))
		}
	}
	return sum
}

// flatten appends a tree's nodes and returns the index of its root.
func flatten(tree *[]Node, n *trees.DecisionTreeNode) int {
	hostile, usual := n.ClassDist["1"], n.ClassDist["0"]
	at := len(*tree)
	// Half a request on either side: no leaf is certain. Four digits keep files small.
	share := (float64(hostile) + 0.5) / (float64(hostile+usual) + 1)
	*tree = append(*tree, Node{Hostile: math.Round(share*1e4) / 1e4})
	if n.Children == nil {
		return at
	}
	signal, _ := strconv.Atoi(n.SplitRule.SplitAttr.GetName())
	children := make([]int, binCount)
	for v := range children {
		if c := n.Children[strconv.Itoa(v)]; c != nil {
			children[v] = flatten(tree, c)
		}
	}
	(*tree)[at].Signal, (*tree)[at].Children = signal, children
	return at
}

func (f *Forest) bin(signal int, v float64) int {
	return sort.SearchFloat64s(f.Edges[signal], v)
}

// score is the mean over the trees of the share of hostile requests that were
// like this one: from 0 to 1.
func (f *Forest) score(signals *[signalCount]float64) float64 {
	var bins [signalCount]int
	for k := range bins {
		bins[k] = f.bin(k, signals[k])
	}
	sum := 0.0
	for _, tree := range f.Trees {
		n := &tree[0]
		for len(n.Children) > 0 {
			next := n.Children[bins[n.Signal]]
			if next == 0 {
				break
			}
			n = &tree[next]
		}
		sum += n.Hostile
	}
	return sum / float64(len(f.Trees))
}

// check refuses a forest that would run out of bounds or in circles.
func (f *Forest) check() error {
	if len(f.Edges) != int(signalCount) {
		return fmt.Errorf("forest: edges of %d signals, there are %d", len(f.Edges), signalCount)
	}
	for k, edges := range f.Edges {
		if len(edges) >= maxBins || !slices.IsSorted(edges) || slices.ContainsFunc(edges, func(v float64) bool { return math.IsNaN(v) || math.IsInf(v, 0) }) {
			return fmt.Errorf("forest: edges of %s: must be fewer than %d rising numbers", SignalNames[k], maxBins)
		}
	}
	if len(f.Trees) == 0 || len(f.Trees) > maxTrees {
		return fmt.Errorf("forest: %d trees: must be 1 to %d", len(f.Trees), maxTrees)
	}
	for t, tree := range f.Trees {
		if len(tree) == 0 || len(tree) > maxNodes {
			return fmt.Errorf("forest: tree %d has %d nodes: must be 1 to %d", t, len(tree), maxNodes)
		}
		for i, n := range tree {
			if !(n.Hostile >= 0 && n.Hostile <= 1) || n.Signal < 0 || n.Signal >= int(signalCount) {
				return fmt.Errorf("forest: tree %d, node %d: signal %d, share %v", t, i, n.Signal, n.Hostile)
			}
			if len(n.Children) > 0 && len(n.Children) <= len(f.Edges[n.Signal]) {
				return fmt.Errorf("forest: tree %d, node %d: %d children for %d bins", t, i, len(n.Children), len(f.Edges[n.Signal])+1)
			}
			for _, c := range n.Children {
				if c != 0 && (c <= i || c >= len(tree)) { // only forward: no circles
					return fmt.Errorf("forest: tree %d, node %d: child %d", t, i, c)
				}
			}
		}
	}
	return nil
}
