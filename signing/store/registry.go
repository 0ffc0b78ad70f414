package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds of the registry.
const (
	// maxBlob is far above any model or data set that Temper is for.
	maxBlob = 4 << 30
	// maxUploads is what a few clients with a few parallel pushes need.
	maxUploads = 256
	// maxUploadAge is when an upload that nothing was added to is given up.
	maxUploadAge = 10 * time.Minute
	// lockTimeout is many times what writing index.json takes.
	lockTimeout = 10 * time.Second
	lockFile    = ".lock"
	// maxDepth is an index of images, once more nested than any tool writes.
	maxDepth = 3
)

// repositoryPattern is that of the OCI distribution specification.
var repositoryPattern = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)

// Registry serves an OCI image layout folder over the OCI distribution
// protocol, with the referrers API. The folder stays a valid layout at every
// moment: blobs are complete and verified before they have their name, and
// index.json lists every manifest. Several processes may use one folder at
// once. There is no authentication: who reaches the port may write.
type Registry struct {
	layout *layout
	server *http.Server
	addr   net.Addr

	// The registry of go-containerregistry answers every read, from manifests
	// in memory that are those of index.json, and from the blobs on disk.
	// Writes are handled here: its own keeps uploads in memory.
	mu     sync.Mutex
	reads  http.Handler
	loaded digest.Digest // of the index.json that reads holds, "" for none

	uploadsMu sync.Mutex
	uploads   map[string]*upload
}

type upload struct {
	mu   sync.Mutex
	part *part
	used time.Time
}

// Start serves the folder dir at a TCP address; "" is a free loopback port.
// The folder is created by the first push. The registry ends with Close or
// when ctx ends.
func Start(ctx context.Context, dir, addr string) (*Registry, error) {
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	g, err := newRegistry(dir)
	if err != nil {
		return nil, err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		g.layout.close()
		return nil, fmt.Errorf("registry: %w: choose another address", err)
	}
	g.addr = l.Addr()
	go g.server.Serve(l)
	context.AfterFunc(ctx, func() { g.Close() })
	return g, nil
}

// Addr is the registry's host and port, which its references start with.
func (g *Registry) Addr() string { return g.addr.String() }

// Close ends the registry; unfinished uploads are removed.
func (g *Registry) Close() error {
	err := g.server.Close()
	g.uploadsMu.Lock()
	for id, u := range g.uploads {
		delete(g.uploads, id)
		u.mu.Lock()
		u.part.discard()
		u.mu.Unlock()
	}
	g.uploadsMu.Unlock()
	return errors.Join(err, g.layout.close())
}

func newRegistry(dir string) (*Registry, error) {
	l, err := openLayout(dir)
	if err != nil {
		return nil, err
	}
	l.clean()
	g := &Registry{layout: l, uploads: map[string]*upload{}}
	if err := g.refresh(); err != nil {
		l.close()
		return nil, err
	}
	// A page in a browser must not reach a registry on loopback.
	protected := http.NewCrossOriginProtection().Handler(g)
	g.server = &http.Server{
		Handler:           protected,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
	return g, nil
}

// inProcess returns a transport whose every connection leads to the registry,
// without a port that others could reach.
func (g *Registry) inProcess() (http.RoundTripper, func() error) {
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	go g.server.Serve(l)
	t := &http.Transport{
		DialContext:        l.dial,
		DisableCompression: true,
		MaxIdleConns:       4,
	}
	return &boundedTransport{inner: t}, func() error {
		t.CloseIdleConnections()
		return g.Close()
	}
}

type pipeListener struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *pipeListener) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	if strings.HasSuffix(addr, ":443") {
		return nil, errors.New("the registry in this process speaks plain HTTP") // clients try HTTPS first
	}
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "localhost" }

// refresh makes reads those of index.json as it is now. The caller holds no
// lock.
func (g *Registry) refresh() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, err := g.refreshLocked()
	return err
}

func (g *Registry) refreshLocked() ([]entry, error) {
	if g.layout.root.Load() == nil {
		if _, err := os.Stat(g.layout.dir); err == nil {
			if err := g.layout.open(); err != nil { // another process made it
				return nil, err
			}
		}
	}
	entries, state, err := g.layout.readIndex()
	if err != nil {
		return nil, err
	}
	if g.reads != nil && state == g.loaded {
		return entries, nil
	}
	reads := ggcr.New(ggcr.WithBlobHandler(g.layout), ggcr.WithReferrersSupport(true), ggcr.Logger(log.New(io.Discard, "", 0)))
	for _, e := range entries {
		if err := g.load(reads, e.repository, e.tag, e.descriptor, 0); err != nil {
			return nil, fmt.Errorf("oci:%s: %w", g.layout.dir, err)
		}
	}
	g.reads, g.loaded = reads, state
	return entries, nil
}

// load puts a manifest of the layout into memory, after those that it lists.
func (g *Registry) load(reads http.Handler, repository, tag string, d ocispec.Descriptor, depth int) error {
	blob, err := g.layout.Get(context.Background(), "", v1.Hash{Algorithm: "sha256", Hex: d.Digest.Encoded()})
	if err != nil {
		return fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	defer blob.Close()
	data, err := io.ReadAll(io.LimitReader(blob, maxManifest+1))
	if err != nil {
		return err
	}
	if int64(len(data)) != d.Size {
		return fmt.Errorf("manifest %s is %d bytes, and %d in %s", d.Digest, len(data), d.Size, ocispec.ImageIndexFile)
	}
	if types.MediaType(d.MediaType).IsIndex() {
		var index ocispec.Index
		if err := json.Unmarshal(data, &index); err != nil {
			return fmt.Errorf("index %s: %w", d.Digest, err)
		}
		if depth == maxDepth || len(index.Manifests) > maxListed {
			return fmt.Errorf("index %s is nested deeper than %d or lists more than %d manifests", d.Digest, maxDepth, maxListed)
		}
		for _, child := range index.Manifests {
			if !digestPattern.MatchString(child.Digest.String()) {
				return fmt.Errorf("index %s lists a manifest with digest %.100q", d.Digest, child.Digest)
			}
			if err := g.load(reads, repository, "", child, depth+1); err != nil {
				return err
			}
		}
	}
	target := tag
	if target == "" {
		target = d.Digest.String()
	}
	return putManifest(reads, repository, target, d.MediaType, data)
}

// maxListed is far above the platforms of any image.
const maxListed = 1000

func putManifest(reads http.Handler, repository, target, mediaType string, data []byte) error {
	req, err := http.NewRequest(http.MethodPut, "http://localhost/v2/"+repository+"/manifests/"+target, bytes.NewReader(data))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", mediaType)
	answer := &discarded{header: http.Header{}}
	reads.ServeHTTP(answer, req)
	if answer.status != http.StatusCreated {
		return fmt.Errorf("manifest %s: status %d: %s", target, answer.status, answer.body)
	}
	return nil
}

// discarded is the answer to a request that this process made of itself.
type discarded struct {
	header http.Header
	status int
	body   []byte
}

func (d *discarded) Header() http.Header         { return d.header }
func (d *discarded) WriteHeader(status int)      { d.status = status }
func (d *discarded) Write(p []byte) (int, error) { d.body = append(d.body, p...); return len(p), nil }

// ServeHTTP answers the OCI distribution protocol.
func (g *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if g.addr != nil && !g.addressed(req.Host) {
		fail(w, http.StatusForbidden, "DENIED", "this registry is for this machine only: use its loopback address")
		return
	}
	repository, kind, target := split(req.URL.Path)
	read := req.Method == http.MethodGet || req.Method == http.MethodHead
	switch {
	case kind == "uploads":
		g.upload(w, req, repository, target)
	case read:
		g.mu.Lock()
		_, err := g.refreshLocked()
		reads := g.reads
		g.mu.Unlock()
		if err != nil {
			failWrite(w, err)
			return
		}
		reads.ServeHTTP(w, req)
	case kind == "manifests" && req.Method == http.MethodPut:
		g.put(w, req, repository, target)
	case kind == "manifests" && req.Method == http.MethodDelete:
		g.delete(w, repository, target)
	default:
		fail(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry does not do that")
	}
}

// addressed says whether a request came in the registry's own name. A name
// that merely resolves to loopback is how a web page reaches it.
func (g *Registry) addressed(host string) bool {
	bound, ok := g.addr.(*net.TCPAddr)
	if !ok || !bound.IP.IsLoopback() {
		return true // bound to be reached from elsewhere, by names unknown here
	}
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return isLoopback(host)
}

// split takes /v2/REPOSITORY/KIND/TARGET apart; an upload's kind is "uploads".
func split(path string) (repository, kind, target string) {
	path, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return "", "", ""
	}
	if i := strings.LastIndex(path, "/blobs/uploads"); i >= 0 {
		return path[:i], "uploads", strings.Trim(path[i+len("/blobs/uploads"):], "/")
	}
	elems := strings.Split(path, "/")
	if len(elems) < 3 {
		return "", "", ""
	}
	n := len(elems)
	return strings.Join(elems[:n-2], "/"), elems[n-2], elems[n-1]
}

func (g *Registry) upload(w http.ResponseWriter, req *http.Request, repository, id string) {
	if !repositoryPattern.MatchString(repository) {
		fail(w, http.StatusBadRequest, "NAME_INVALID", "repository names are lower-case letters, digits, '.', '_', '-' and '/'")
		return
	}
	if req.Method == http.MethodPost {
		var err error
		if id, err = g.newUpload(); err != nil {
			failWrite(w, err)
			return
		}
	}
	g.uploadsMu.Lock()
	u := g.uploads[id]
	g.uploadsMu.Unlock()
	if u == nil {
		fail(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "no such upload: start again")
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	want := req.URL.Query().Get("digest")
	status := http.StatusAccepted
	switch req.Method {
	case http.MethodPost, http.MethodPatch:
	case http.MethodPut:
		if !digestPattern.MatchString(want) {
			fail(w, http.StatusBadRequest, "DIGEST_INVALID", "a digest is sha256: and 64 lower-case hex digits")
			return
		}
	case http.MethodDelete:
		g.drop(id, u)
		w.WriteHeader(http.StatusNoContent)
		return
	default:
		fail(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry does not do that")
		return
	}
	if r := req.Header.Get("Content-Range"); r != "" {
		var from, to int64
		if _, err := fmt.Sscanf(r, "%d-%d", &from, &to); err != nil || from != u.part.size {
			fail(w, http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID", fmt.Sprintf("the upload continues at byte %d", u.part.size))
			return
		}
	}
	u.used = time.Now()
	if _, err := io.Copy(u.part, http.MaxBytesReader(w, req.Body, maxBlob-u.part.size)); err != nil {
		g.drop(id, u)
		failWrite(w, err)
		return
	}
	if want != "" && req.Method != http.MethodPatch {
		defer g.drop(id, u)
		if got := u.part.digest(); got != want {
			fail(w, http.StatusBadRequest, "DIGEST_INVALID", fmt.Sprintf("the content's digest is %s, not %s", got, want))
			return
		}
		if err := u.part.commit(blobFolder + "/" + strings.TrimPrefix(want, "sha256:")); err != nil {
			failWrite(w, err)
			return
		}
		w.Header().Set("Docker-Content-Digest", want)
		w.Header().Set("Location", "/v2/"+repository+"/blobs/"+want)
		w.WriteHeader(http.StatusCreated)
		return
	}
	w.Header().Set("Location", "/v2/"+repository+"/blobs/uploads/"+id)
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(u.part.size-1, 0)))
	w.Header().Set("Docker-Upload-UUID", id)
	w.WriteHeader(status)
}

func (g *Registry) newUpload() (string, error) {
	g.mu.Lock()
	err := g.layout.make()
	g.mu.Unlock()
	if err != nil {
		return "", err
	}
	g.uploadsMu.Lock()
	defer g.uploadsMu.Unlock()
	for id, u := range g.uploads {
		if u.mu.TryLock() {
			if time.Since(u.used) > maxUploadAge {
				u.part.discard()
				delete(g.uploads, id)
			}
			u.mu.Unlock()
		}
	}
	if len(g.uploads) >= maxUploads {
		return "", errTooMany
	}
	p, err := g.layout.newPart()
	if err != nil {
		return "", err
	}
	id := rand.Text()
	g.uploads[id] = &upload{part: p, used: time.Now()}
	return id, nil
}

var errChanged = errors.New("the tag names another manifest than If-Match or If-None-Match says")

var errTooMany = errors.New("too many uploads at once")

// drop forgets an upload; the caller holds its lock.
func (g *Registry) drop(id string, u *upload) {
	u.part.discard()
	g.uploadsMu.Lock()
	delete(g.uploads, id)
	g.uploadsMu.Unlock()
}

// put stores a manifest: first its bytes, then its place in index.json.
func (g *Registry) put(w http.ResponseWriter, req *http.Request, repository, target string) {
	if !repositoryPattern.MatchString(repository) || !tagPattern.MatchString(target) && !digestPattern.MatchString(target) {
		fail(w, http.StatusBadRequest, "NAME_INVALID", "a manifest is put at REPOSITORY and a tag or sha256 digest")
		return
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxManifest))
	if err != nil {
		failWrite(w, err)
		return
	}
	sum := sha256.Sum256(data)
	if digestPattern.MatchString(target) && target != digestOf(sum).String() {
		fail(w, http.StatusBadRequest, "DIGEST_INVALID", "the manifest's digest is not the one that it is put at")
		return
	}
	mediaType := req.Header.Get("Content-Type")
	if missing, err := g.missing(data, mediaType); err != nil {
		fail(w, http.StatusBadRequest, "MANIFEST_INVALID", err.Error())
		return
	} else if missing != "" {
		fail(w, http.StatusNotFound, "MANIFEST_BLOB_UNKNOWN", "the manifest refers to "+missing+", which was not pushed")
		return
	}
	tag := ""
	if tagPattern.MatchString(target) {
		tag = target
	}
	err = g.change(func(entries []entry) ([]entry, error) {
		now := slices.IndexFunc(entries, func(e entry) bool { return tag != "" && e.repository == repository && e.tag == tag })
		if want := req.Header.Get("If-Match"); want != "" && (now < 0 || want != `"`+entries[now].descriptor.Digest.String()+`"`) ||
			req.Header.Get("If-None-Match") == "*" && now >= 0 {
			return nil, errChanged
		}
		if err := putManifest(g.reads, repository, target, mediaType, data); err != nil {
			return nil, err
		}
		if err := g.layout.putBlob(data); err != nil {
			return nil, err
		}
		return with(entries, newEntry(repository, tag, data, mediaType)), nil
	})
	if err != nil {
		failWrite(w, err)
		return
	}
	w.Header().Set("Docker-Content-Digest", digestOf(sum).String())
	w.Header().Set("Location", "/v2/"+repository+"/manifests/"+target)
	var about struct{ Subject *ocispec.Descriptor }
	if json.Unmarshal(data, &about) == nil && about.Subject != nil {
		w.Header().Set("OCI-Subject", about.Subject.Digest.String())
	}
	w.WriteHeader(http.StatusCreated)
}

// missing names a blob that a manifest refers to and that is not here.
func (g *Registry) missing(data []byte, mediaType string) (string, error) {
	var m struct {
		Config    *ocispec.Descriptor
		Layers    []ocispec.Descriptor
		Manifests []ocispec.Descriptor
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return "", fmt.Errorf("the manifest is not JSON: %w", err)
	}
	if !types.MediaType(mediaType).IsImage() && !types.MediaType(mediaType).IsIndex() {
		return "", fmt.Errorf("media type %.100q: only image manifests and indexes are stored", mediaType)
	}
	parts := slices.Concat(m.Layers, m.Manifests)
	if m.Config != nil {
		parts = append(parts, *m.Config)
	}
	if len(parts) > maxListed {
		return "", fmt.Errorf("the manifest lists %d blobs: at most %d", len(parts), maxListed)
	}
	for _, d := range parts {
		if !digestPattern.MatchString(d.Digest.String()) {
			return "", fmt.Errorf("the manifest refers to digest %.100q: only sha256 is supported", d.Digest)
		}
		size, err := g.layout.Stat(context.Background(), "", v1.Hash{Algorithm: "sha256", Hex: d.Digest.Encoded()})
		if err != nil {
			return d.Digest.String(), nil
		}
		if size != d.Size {
			return "", fmt.Errorf("%s is %d bytes, and %d in the manifest", d.Digest, size, d.Size)
		}
	}
	return "", nil
}

func (g *Registry) delete(w http.ResponseWriter, repository, target string) {
	found := false
	err := g.change(func(entries []entry) ([]entry, error) {
		g.reads = nil // rebuilt without it by the next read
		var out []entry
		for _, e := range entries {
			switch {
			case e.repository == repository && e.descriptor.Digest.String() == target:
				found = true
				continue
			case e.repository == repository && e.tag != "" && e.tag == target:
				found = true
				e = e.untagged()
			}
			out = append(out, e)
		}
		return out, nil
	})
	switch {
	case err != nil:
		failWrite(w, err)
	case !found:
		fail(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "no such manifest")
	default:
		w.WriteHeader(http.StatusAccepted)
	}
}

// change replaces index.json, alone among the processes that use the folder.
func (g *Registry) change(edit func([]entry) ([]entry, error)) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.layout.make(); err != nil {
		return err
	}
	unlock, err := g.layout.lock()
	if err != nil {
		return err
	}
	defer unlock()
	before, err := g.refreshLocked()
	if err != nil {
		return err
	}
	// Until index.json is written, memory may be ahead of it.
	loaded := g.loaded
	g.loaded = ""
	entries, err := edit(before)
	if err != nil {
		g.reads = nil
		return err
	}
	if slices.EqualFunc(before, entries, func(a, b entry) bool {
		return a.repository == b.repository && a.tag == b.tag && a.descriptor.Digest == b.descriptor.Digest
	}) {
		g.loaded = loaded
		return nil
	}
	state, err := g.layout.writeIndex(entries)
	if err != nil {
		g.reads = nil
		return err
	}
	g.loaded = state
	return nil
}

// lock waits for other processes that change index.json.
func (l *layout) lock() (func(), error) {
	f, err := l.root.Load().OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for until := time.Now().Add(lockTimeout); ; time.Sleep(5 * time.Millisecond) {
		ok, err := tryLock(f)
		if ok {
			return func() { f.Close() }, nil // closing gives the lock back
		}
		if err == nil && time.Now().After(until) {
			err = fmt.Errorf("oci:%s is locked by another process: try again when it is done", l.dir)
		}
		if err != nil {
			f.Close()
			return nil, err
		}
	}
}

// failWrite answers a request that the disk or its size did not allow.
func failWrite(w http.ResponseWriter, err error) {
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		fail(w, http.StatusRequestEntityTooLarge, "SIZE_INVALID", fmt.Sprintf("at most %d bytes", tooLarge.Limit))
	case errors.Is(err, errChanged):
		fail(w, http.StatusPreconditionFailed, "DENIED", err.Error())
	case errors.Is(err, errTooMany):
		fail(w, http.StatusTooManyRequests, "TOOMANYREQUESTS", err.Error())
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		fail(w, http.StatusInsufficientStorage, "UNKNOWN", err.Error())
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		fail(w, http.StatusForbidden, "DENIED", "the folder cannot be written: "+err.Error())
	case errors.Is(err, io.ErrUnexpectedEOF):
		fail(w, http.StatusBadRequest, "BLOB_UPLOAD_INVALID", "the upload was cut short")
	default:
		fail(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
	}
}

func fail(w http.ResponseWriter, status int, code, message string) {
	body, _ := json.Marshal(map[string]any{"errors": []map[string]string{{"code": code, "message": message}}})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(body)
}

func digestOf(sum [sha256.Size]byte) digest.Digest {
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(sum[:]))
}
