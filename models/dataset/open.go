package dataset

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/temper-ml/temper/models/nn"
	"github.com/temper-ml/temper/models/unknown"
)

//go:embed mnist/*.gz
var embedded embed.FS

// defaultValidation is the size of the validation part cut off the end of the
// training examples: the customary 5,000 of MNIST's 60,000, or a twelfth of a
// smaller set.
const defaultValidation = 5000

type options struct {
	validation int
	digest     string
	cache      string
	client     *http.Client
	pause      time.Duration // before the first retry; doubled for each one after
}

// Option changes how Open reads.
type Option func(*options)

// Validation sets how many examples are cut off the end of the training set,
// where the source has no validation part of its own.
func Validation(n int) Option { return func(o *options) { o.validation = n } }

// Pin refuses content whose Splits.Digest is another.
func Pin(digest string) Option { return func(o *options) { o.digest = digest } }

// Cache is the folder for downloads, instead of temper/datasets in the user's
// cache folder.
func Cache(dir string) Option { return func(o *options) { o.cache = dir } }

// Client makes the requests for downloads.
func Client(c *http.Client) Option { return func(o *options) { o.client = c } }

// MNIST returns the embedded MNIST: 55,000 training, 5,000 validation and
// 10,000 test images.
func MNIST() (*Splits, error) { return Open(context.Background(), "mnist") }

// Open reads a data set, by what ref is:
//
//   - "mnist": the embedded one;
//   - a folder of IDX files, plain or gzip, named as those of MNIST
//     (PART-images*, PART-labels* of the parts train, validation, and test or
//     t10k; only the test part is required), and classes.txt where it has one;
//   - an http or https URL of such a folder, with the digest of its content
//     pinned: "https://example.org/digits#sha256:...". Downloads are cached.
//
// "#sha256:..." may follow a folder or "mnist" too. An unknown name is an
// *unknown.Error; a server that cannot be reached is an *Unavailable.
func Open(ctx context.Context, ref string, opts ...Option) (*Splits, error) {
	o := options{validation: -1, client: defaultClient, pause: time.Second}
	for _, opt := range opts {
		opt(&o)
	}
	name, pin, pinned := strings.Cut(ref, "#")
	if pinned {
		if o.digest != "" && o.digest != pin {
			return nil, fmt.Errorf("dataset %s: pinned to two digests: %s and %s", public(name), pin, o.digest)
		}
		o.digest = pin
	}
	if o.digest != "" && !digestPattern.MatchString(o.digest) {
		return nil, fmt.Errorf("dataset %s: digest %q: must be sha256: and 64 hexadecimal digits", public(name), o.digest)
	}
	if isURL(name) {
		return download(ctx, name, o)
	}
	splits, err := openLocal(name, o)
	if err != nil {
		return nil, err
	}
	if o.digest != "" {
		if got := splits.Digest(); got != o.digest {
			return nil, fmt.Errorf("dataset %s: its digest is %s, pinned is %s", name, got, o.digest)
		}
	}
	return splits, nil
}

var digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// names are the data sets that need no path.
var names = []string{"mnist"}

func openLocal(name string, o options) (*Splits, error) {
	if name == "mnist" {
		dir, err := fs.Sub(embedded, "mnist")
		if err != nil {
			return nil, err
		}
		return readFolder(name, dir, o)
	}
	info, err := os.Stat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !strings.ContainsAny(name, `/\.`):
		return nil, fmt.Errorf("%w; or give a folder of IDX files or an http(s) URL", unknown.Name("dataset", name, names))
	case err != nil:
		return nil, fmt.Errorf("dataset: %w", err)
	case !info.IsDir():
		return nil, fmt.Errorf("dataset %s: not a folder: give the folder that holds the IDX files", name)
	}
	// os.Root keeps symbolic links in a folder from leading out of it.
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, fmt.Errorf("dataset: %w", err)
	}
	defer root.Close()
	return readFolder(name, root.FS(), o)
}

// part is one of the three splits in a folder; files are named
// PREFIX-images* and PREFIX-labels*, such as train-images-idx3-ubyte.gz.
type part struct {
	name     string
	prefixes []string
}

var (
	trainPart      = part{"train", []string{"train"}}
	validationPart = part{"validation", []string{"validation"}}
	testPart       = part{"test", []string{"t10k", "test"}}
	parts          = []part{trainPart, validationPart, testPart}
)

// classesFile names the classes, one a line, in a folder; without it they are
// "0", "1", ... up to the largest label.
const classesFile = "classes.txt"

// readFolder reads the parts that a folder holds. Only a test part is required.
func readFolder(name string, dir fs.FS, o options) (*Splits, error) {
	train, err := readPart(name, dir, trainPart)
	if err != nil {
		return nil, err
	}
	validation, err := readPart(name, dir, validationPart)
	if err != nil {
		return nil, err
	}
	test, err := readPart(name, dir, testPart)
	if err != nil {
		return nil, err
	}
	if test.Len() == 0 {
		return nil, fmt.Errorf("dataset %s: no test images: expected t10k-images* or test-images*, with labels, as IDX files", name)
	}
	classes, err := readClasses(dir, train, validation, test)
	if err != nil {
		return nil, fmt.Errorf("dataset %s: %w", name, err)
	}
	for _, s := range []*Set{train, validation, test} {
		s.Classes = classes
		if s.Len() == 0 {
			s.Shape = test.Shape
		}
		if s.Shape != test.Shape {
			return nil, fmt.Errorf("dataset %s: images of %v, but those of %s are %v", s.Name, s.Shape, test.Name, test.Shape)
		}
		if err := s.Validate(); err != nil {
			return nil, err
		}
	}
	switch {
	case validation.Len() == 0 && train.Len() > 0:
		n := o.validation
		if n < 0 {
			n = min(defaultValidation, train.Len()/12)
		}
		if n >= train.Len() {
			return nil, fmt.Errorf("dataset %s: a validation part of %d leaves nothing of %d training examples", name, n, train.Len())
		}
		cut := train.Len() - n
		validation, train = train.Slice(cut, train.Len()), train.Slice(0, cut)
		validation.Name = name + "/" + validationPart.name
	case o.validation >= 0 && validation.Len() != o.validation:
		return nil, fmt.Errorf("dataset %s: a validation part of %d was asked for, but the folder has its own of %d", name, o.validation, validation.Len())
	}
	if train.Len() > 0 && validation.Len() > 0 && (train.Floats == nil) != (validation.Floats == nil) {
		return nil, fmt.Errorf("dataset %s: train and validation images must both be bytes or both be floats", name)
	}
	splits := &Splits{Name: name, Train: train, Validation: validation, Test: test}
	return splits, splits.Check()
}

// readPart reads one part's images and labels; an empty set where the folder
// has neither.
func readPart(name string, dir fs.FS, p part) (*Set, error) {
	s := &Set{Name: name + "/" + p.name}
	images, imagesFile, err := readOne(name, dir, p, "images")
	if err != nil {
		return nil, err
	}
	labels, labelsFile, err := readOne(name, dir, p, "labels")
	if err != nil {
		return nil, err
	}
	switch {
	case images == nil && labels == nil:
		return s, nil
	case images == nil || labels == nil:
		have, miss := imagesFile, "labels"
		if images == nil {
			have, miss = labelsFile, "images"
		}
		return nil, fmt.Errorf("dataset %s: %s has no %s beside it", name, have, miss)
	case labels.Bytes == nil || len(labels.Dims) != 1:
		return nil, fmt.Errorf("dataset %s: %s: labels must be one dimension of ubyte", name, labelsFile)
	case len(images.Dims) < 3:
		return nil, fmt.Errorf("dataset %s: %s: dimensions %v: images have three (examples, height, width) or four (and channels)", name, imagesFile, images.Dims)
	case images.Dims[0] != labels.Dims[0]:
		return nil, fmt.Errorf("dataset %s: %d images in %s, but %d labels in %s", name, images.Dims[0], imagesFile, labels.Dims[0], labelsFile)
	}
	s.Shape = nn.Shape{Height: images.Dims[1], Width: images.Dims[2], Channels: 1}
	if len(images.Dims) == 4 {
		s.Shape.Channels = images.Dims[3]
	}
	if err := checkShape(s.Shape); err != nil {
		return nil, fmt.Errorf("dataset %s: %s: %w", name, imagesFile, err)
	}
	s.Bytes, s.Floats, s.Labels = images.Bytes, images.Floats, labels.Bytes
	return s, nil
}

// readOne reads the one file of a part and kind ("images" or "labels"), nil
// where there is none.
func readOne(name string, dir fs.FS, p part, kind string) (*IDX, string, error) {
	entries, err := fs.ReadDir(dir, ".")
	if err != nil {
		return nil, "", fmt.Errorf("dataset %s: %w", name, err)
	}
	found := ""
	for _, e := range entries {
		for _, prefix := range p.prefixes {
			if !strings.HasPrefix(e.Name(), prefix+"-"+kind) {
				continue
			}
			if found != "" {
				return nil, "", fmt.Errorf("dataset %s: both %s and %s: keep one", name, found, e.Name())
			}
			found = e.Name()
		}
	}
	if found == "" {
		return nil, "", nil
	}
	data, err := readFile(dir, found, MaxFile)
	if err != nil {
		return nil, "", fmt.Errorf("dataset %s: %w", name, err)
	}
	a, err := ParseIDX(data)
	if err != nil {
		return nil, "", fmt.Errorf("dataset %s: %s: %w", name, found, err)
	}
	return a, found, nil
}

// readFile reads a file of at most limit bytes.
func readFile(dir fs.FS, name string, limit int64) ([]byte, error) {
	info, err := fs.Stat(dir, name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", name)
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("%s: %d bytes: at most %d", name, info.Size(), limit)
	}
	return fs.ReadFile(dir, name)
}

// Bounds on classes.txt: 256 names (labels are bytes) of a readable length.
const (
	maxClassName   = 128
	maxClassesFile = maxClasses * (maxClassName + 2)
)

func readClasses(dir fs.FS, sets ...*Set) ([]string, error) {
	data, err := readFile(dir, classesFile, maxClassesFile)
	if errors.Is(err, fs.ErrNotExist) {
		largest := uint8(1)
		for _, s := range sets {
			for _, l := range s.Labels {
				largest = max(largest, l)
			}
		}
		var classes []string
		for i := range int(largest) + 1 {
			classes = append(classes, fmt.Sprint(i))
		}
		return classes, nil
	}
	if err != nil {
		return nil, err
	}
	return parseClasses(string(data))
}

func parseClasses(text string) ([]string, error) {
	var classes []string
	seen := map[string]bool{}
	for line := range strings.Lines(text) {
		class := strings.TrimRight(line, "\r\n")
		if class == "" || len(class) > maxClassName || !printable(class) {
			return nil, fmt.Errorf("%s: line %d: a class name is 1 to %d bytes of printable text", classesFile, len(classes)+1, maxClassName)
		}
		if seen[class] {
			return nil, fmt.Errorf("%s: line %d: class %q is there twice", classesFile, len(classes)+1, class)
		}
		seen[class] = true
		classes = append(classes, class)
	}
	if len(classes) < 2 || len(classes) > maxClasses {
		return nil, fmt.Errorf("%s: %d classes: must be 2 to %d, one a line", classesFile, len(classes), maxClasses)
	}
	return classes, nil
}
