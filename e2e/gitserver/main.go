// Gitserver is the git server of the end-to-end tests: one repository in
// memory, at every path, over git's smart HTTP protocol. Whoever reaches it may
// push.
package main

import (
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"path"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/pktline"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/transport"
	"github.com/go-git/go-git/v5/plumbing/transport/server"
	"github.com/go-git/go-git/v5/storage/memory"
)

const (
	uploadPack  = "git-upload-pack"  // a fetch
	receivePack = "git-receive-pack" // a push
)

// repository serves one repository.
type repository struct {
	endpoint *transport.Endpoint
	git      transport.Transport
}

func main() {
	endpoint := &transport.Endpoint{Path: "/repository"}
	store := memory.NewStorage()
	if err := store.SetReference(plumbing.NewSymbolicReference(plumbing.HEAD, plumbing.Main)); err != nil {
		log.Fatal(err)
	}
	r := &repository{endpoint, server.NewServer(server.MapLoader{endpoint.String(): store})}
	http.HandleFunc("GET /", r.advertise)
	http.HandleFunc("POST /", r.exchange)
	s := &http.Server{Addr: ":8080", ReadHeaderTimeout: 10 * time.Second}
	log.Fatal(s.ListenAndServe())
}

// advertise answers GET .../info/refs?service=SERVICE.
func (r *repository) advertise(w http.ResponseWriter, req *http.Request) {
	service := req.URL.Query().Get("service")
	var session interface {
		AdvertisedReferencesContext(context.Context) (*packp.AdvRefs, error)
	}
	var err error
	switch service {
	case uploadPack:
		session, err = r.git.NewUploadPackSession(r.endpoint, nil)
	case receivePack:
		session, err = r.git.NewReceivePackSession(r.endpoint, nil)
	default:
		http.NotFound(w, req)
		return
	}
	if err == nil {
		var refs *packp.AdvRefs
		if refs, err = session.AdvertisedReferencesContext(req.Context()); err == nil {
			refs.Prefix = [][]byte{[]byte("# service=" + service), pktline.Flush}
			w.Header().Set("Content-Type", "application/x-"+service+"-advertisement")
			w.Header().Set("Cache-Control", "no-cache")
			err = refs.Encode(w)
		}
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// exchange answers POST .../SERVICE.
func (r *repository) exchange(w http.ResponseWriter, req *http.Request) {
	service := path.Base(req.URL.Path)
	w.Header().Set("Content-Type", "application/x-"+service+"-result")
	var err error
	switch service {
	case uploadPack:
		err = r.fetch(req.Context(), w, req.Body)
	case receivePack:
		err = r.push(req.Context(), w, req.Body)
	default:
		http.NotFound(w, req)
		return
	}
	if err != nil {
		log.Printf("%s: %v", service, err)
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func (r *repository) fetch(ctx context.Context, w io.Writer, body io.Reader) error {
	session, err := r.git.NewUploadPackSession(r.endpoint, nil)
	if err != nil {
		return err
	}
	request := packp.NewUploadPackRequest()
	if err := request.UploadRequest.Decode(body); err != nil {
		return err
	}
	// The server's half of go-git knows no shallow fetch: give all there is,
	// as a server without that feature does.
	request.Depth = packp.DepthCommits(0)
	answer, err := session.UploadPack(ctx, request)
	if err != nil {
		return err
	}
	return answer.Encode(w)
}

func (r *repository) push(ctx context.Context, w io.Writer, body io.Reader) error {
	session, err := r.git.NewReceivePackSession(r.endpoint, nil)
	if err != nil {
		return err
	}
	request := packp.NewReferenceUpdateRequest()
	if err := request.Decode(body); err != nil {
		return err
	}
	status, err := session.ReceivePack(ctx, request)
	if status != nil {
		return errors.Join(err, status.Encode(w))
	}
	return err
}
