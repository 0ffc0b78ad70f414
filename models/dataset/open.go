package dataset

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"weak"

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
//   - a folder of IDX files, plain or gzip, named as those of MNIST and
//     Fashion-MNIST (PART-images*, PART-labels* of the parts train, validation,
//     and test or t10k; only the test part is required);
//   - a folder of PNG or JPEG images by class: PART/CLASS/*.png, or CLASS/*.png,
//     of which a sixth becomes the test part;
//   - a folder of CIFAR-10's binary files: data_batch_*.bin, test_batch.bin;
//   - an http or https URL of a folder of IDX files, with the digest of its
//     content pinned: "https://example.org/digits#sha256:...". Downloads are
//     cached.
//
// classes.txt in a folder names its classes, one a line. Data sets larger than
// 64 MB lie in a temporary file (in TMPDIR), not on the heap. What is returned
// may be shared, and must not be written to.
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
	splits, err := openLocal(ctx, name, o)
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

func openLocal(ctx context.Context, name string, o options) (*Splits, error) {
	if name == "mnist" {
		return openEmbedded(ctx, name, o)
	}
	info, err := os.Stat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !strings.ContainsAny(name, `/\.`):
		return nil, fmt.Errorf("%w; or give a folder of IDX files or images, or an http(s) URL", unknown.Name("dataset", name, names))
	case err != nil:
		return nil, fmt.Errorf("dataset: %w", err)
	case !info.IsDir():
		return nil, fmt.Errorf("dataset %s: not a folder: give the folder that holds the data set, unpacked", name)
	}
	// os.Root keeps symbolic links in a folder from leading out of it.
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, fmt.Errorf("dataset: %w", err)
	}
	defer root.Close()
	return readFolder(ctx, name, root.FS(), o)
}

// shared is the embedded data set while somebody holds it: reading it again takes
// a third of a second and 50 MB.
var shared struct {
	sync.Mutex
	weak.Pointer[Splits]
}

func openEmbedded(ctx context.Context, name string, o options) (*Splits, error) {
	shared.Lock()
	defer shared.Unlock()
	usual := o.validation < 0
	if s := shared.Value(); s != nil && usual {
		return s, nil
	}
	dir, err := fs.Sub(embedded, name)
	if err != nil {
		return nil, err
	}
	s, err := readFolder(ctx, name, dir, o)
	if err == nil && usual {
		shared.Pointer = weak.Make(s)
	}
	return s, err
}

// part is one of the three splits in a folder. IDX files are named
// PREFIX-images* and PREFIX-labels*, such as train-images-idx3-ubyte.gz; images
// are in folders of that name.
type part struct {
	name     string
	prefixes []string
	folders  []string
}

var (
	trainPart      = part{"train", []string{"train"}, []string{"train"}}
	validationPart = part{"validation", []string{"validation"}, []string{"validation", "val"}}
	testPart       = part{"test", []string{"t10k", "test"}, []string{"test"}}
	parts          = []part{trainPart, validationPart, testPart}
)

// classesFile names the classes, one a line, in a folder; without it they are
// the names of the folders of images, or "0", "1", ... up to the largest label.
const classesFile = "classes.txt"

// readFolder reads the parts that a folder holds, by what is in it. Only a test
// part is required.
func readFolder(ctx context.Context, name string, dir fs.FS, o options) (*Splits, error) {
	splits, err := readParts(ctx, name, dir)
	if err != nil {
		return nil, err
	}
	train, validation, test := splits.Train, splits.Validation, splits.Test
	for _, s := range []*Set{train, validation, test} {
		s.Classes = test.Classes
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
	splits.Train, splits.Validation = train, validation
	return splits, splits.Check()
}

// readParts reads a folder in the form that its files have, with the classes
// of the test part.
func readParts(ctx context.Context, name string, dir fs.FS) (*Splits, error) {
	forms, folders, err := formsOf(dir)
	if err != nil {
		return nil, fmt.Errorf("dataset %s: %w", name, err)
	}
	if len(forms) > 1 {
		return nil, fmt.Errorf("dataset %s: both %s: keep one", name, strings.Join(forms, " and "))
	}
	const expected = "expected IDX files (t10k-images* or test-images*, with labels), images in test/CLASS or in CLASS, or CIFAR-10's " + cifarTest
	if len(forms) == 0 {
		return nil, fmt.Errorf("dataset %s: no test images: %s", name, expected)
	}
	var splits *Splits
	var classes []string
	switch forms[0] {
	case idxForm:
		splits = &Splits{Name: name}
		for i, to := range []**Set{&splits.Train, &splits.Validation, &splits.Test} {
			if *to, err = readPart(name, dir, parts[i]); err != nil {
				return nil, err
			}
		}
		classes, err = readClasses(dir, splits.Train, splits.Validation, splits.Test)
	case cifarForm:
		if splits, err = readCIFAR(name, dir); err != nil {
			return nil, err
		}
		classes, err = cifarNames(dir)
	case imageForm:
		splits, classes, err = readImages(ctx, name, dir, folders)
	}
	if err != nil {
		return nil, fmt.Errorf("dataset %s: %w", name, err)
	}
	if splits.Test.Len() == 0 {
		return nil, fmt.Errorf("dataset %s: no test images: %s", name, expected)
	}
	splits.Test.Classes = classes
	return splits, nil
}

// The forms that a folder's data can have.
const (
	idxForm   = "IDX files"
	cifarForm = "CIFAR-10's files"
	imageForm = "folders of images"
)

// formsOf tells what a folder holds, and which folders. Beside data files,
// folders are of no interest.
func formsOf(dir fs.FS) (forms, folders []string, err error) {
	entries, err := fs.ReadDir(dir, ".")
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		form := ""
		batch, _ := path.Match(cifarTrain, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), "."):
		case slices.ContainsFunc(parts, func(p part) bool { return p.has(e.Name(), "images") || p.has(e.Name(), "labels") }):
			form = idxForm
		case batch || e.Name() == cifarTest:
			form = cifarForm
		case e.IsDir():
			folders = append(folders, e.Name())
		}
		if form != "" && !slices.Contains(forms, form) {
			forms = append(forms, form)
		}
	}
	if len(forms) == 0 && len(folders) > 0 {
		forms = []string{imageForm}
	}
	return forms, folders, nil
}

// has tells whether a file is the part's, of a kind ("images" or "labels").
func (p part) has(file, kind string) bool {
	return slices.ContainsFunc(p.prefixes, func(prefix string) bool { return strings.HasPrefix(file, prefix+"-"+kind) })
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
		if !p.has(e.Name(), kind) {
			continue
		}
		if found != "" {
			return nil, "", fmt.Errorf("dataset %s: both %s and %s: keep one", name, found, e.Name())
		}
		found = e.Name()
	}
	if found == "" {
		return nil, "", nil
	}
	a, err := readIDX(dir, found)
	if err != nil {
		return nil, "", fmt.Errorf("dataset %s: %w", name, err)
	}
	return a, found, nil
}

func readIDX(dir fs.FS, name string) (*IDX, error) {
	info, err := regular(dir, name, MaxFile)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	f, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	at, ok := f.(io.ReaderAt)
	if !ok {
		return nil, fmt.Errorf("%s: a file system without random access", name)
	}
	a, err := ReadIDX(at, info.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return a, nil
}

// regular refuses what is not a file of at most limit bytes: a pipe could block
// for ever.
func regular(dir fs.FS, name string, limit int64) (fs.FileInfo, error) {
	info, err := fs.Stat(dir, name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("%d bytes: at most %d", info.Size(), limit)
	}
	return info, nil
}

// readFile reads a file of at most limit bytes.
func readFile(dir fs.FS, name string, limit int64) ([]byte, error) {
	if _, err := regular(dir, name, limit); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
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
	return parseClasses(classesFile, string(data))
}

// parseClasses reads the names in a file, or of folders, one a line.
func parseClasses(file, text string) ([]string, error) {
	var classes []string
	seen := map[string]bool{}
	for line := range strings.Lines(text) {
		class := strings.TrimRight(line, "\r\n")
		if class == "" || len(class) > maxClassName || !printable(class) {
			return nil, fmt.Errorf("%s: line %d: a class name is 1 to %d bytes of printable text", file, len(classes)+1, maxClassName)
		}
		if seen[class] {
			return nil, fmt.Errorf("%s: line %d: class %q is there twice", file, len(classes)+1, class)
		}
		seen[class] = true
		classes = append(classes, class)
	}
	if len(classes) < 2 || len(classes) > maxClasses {
		return nil, fmt.Errorf("%s: %d classes: must be 2 to %d, one a line", file, len(classes), maxClasses)
	}
	return classes, nil
}
