package sentinel

import (
	"context"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"

	"github.com/temper-ml/temper/models/evaluate"
)

// The page is plain files that load nothing from elsewhere and hold no script
// or style of their own, so that the policy which forbids both can stand.
func TestCase64PageIsStatic(t *testing.T) {
	f := start(t, nil)
	policy := ""
	for _, path := range []string{"/", "/page/page.css", "/page/page.js", "/status", "/evidence"} {
		w := httptest.NewRecorder()
		f.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		if w.Code != http.StatusOK || w.Body.Len() == 0 {
			t.Errorf("%s: %d", path, w.Code)
		}
		if policy = w.Header().Get("Content-Security-Policy"); !strings.HasPrefix(policy, "default-src 'none'; script-src 'self'; style-src 'self'") || strings.Contains(policy, "unsafe") {
			t.Errorf("%s: policy %q", path, policy)
		}
		if w.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: a browser may guess its type", path)
		}
	}
	forbidden := regexp.MustCompile(`(?i)https?://[^w]|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|<style|\son\w+=|\sstyle=|javascript:`)
	inline := regexp.MustCompile(`(?is)<script[^>]*>[^<]+</script>`)
	err := fs.WalkDir(pageFiles, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := fs.ReadFile(pageFiles, path)
		if found := forbidden.Find(text); found != nil {
			t.Errorf("%s: %q", path, found)
		}
		if found := inline.Find(text); found != nil {
			t.Errorf("%s: %q", path, found)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// hostileText would run, load or break out if it were taken for markup.
const hostileText = `"><script>window.pwned=1</script><img src=x onerror="window.pwned=1"><style>body{display:none}</style>`

// In a browser: what the page shows, that hostile texts stay text, that all
// of it can be reached by keyboard and named by a screen reader. Screenshots
// are kept with 'go test -artifacts'.
func TestCase64PageInBrowser(t *testing.T) {
	if testing.Short() {
		t.Skip("a browser")
	}
	browser := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			browser = path
			break
		}
	}
	if browser == "" {
		if os.Getenv("TEMPER_TEST_BROWSER") != "" {
			t.Fatal("no chromium: install it (apt-get install chromium)")
		}
		t.Skip("no chromium: install it (apt-get install chromium) to test the page")
	}
	f := start(t, func(c *Config) { c.Circuit = 1 })
	m := f.model
	m.Version = "v2"
	m.About = About{
		Classes: []string{hostileText, "one", "two"}, SignedBy: []string{hostileText}, Network: "test", Clean: 0.99, Robust: 0.85, Epsilon: 0.3,
		Curve: []evaluate.Point{{Epsilon: 0, Accuracy: 0.99}, {Epsilon: 0.15, Accuracy: 0.95}, {Epsilon: 0.3, Accuracy: 0.85}, {Epsilon: 0.5, Accuracy: 0.1}},
	}
	if err := f.Use(m); err != nil {
		t.Fatal(err)
	}
	f.problem = hostileText
	x := clean(40, 3)
	for i := range x.Len() {
		f.clock.Add(time.Second)
		f.send(x.at(i))
	}
	f.clock.Add(time.Second)
	f.attack()
	f.note(f.Status().Open.ID, hostileText, hostileText)
	f.clock.Add(5 * time.Second)
	f.Status()

	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(browser), chromedp.NoSandbox, chromedp.WindowSize(1280, 1600))
	ctx, cancel := chromedp.NewExecAllocator(t.Context(), options...)
	defer cancel()
	ctx, cancel = chromedp.NewContext(ctx)
	defer cancel()
	ctx, cancel = context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()

	do := func(actions ...chromedp.Action[chromedp.Void]) {
		t.Helper()
		if err := chromedp.Do(ctx, actions...); err != nil {
			t.Fatal(err)
		}
	}
	shot := func(name, scheme string) {
		t.Helper()
		features := []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}
		if _, err := chromedp.Call(ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: features}); err != nil {
			t.Fatal(err)
		}
		picture, err := chromedp.Run(ctx, chromedp.FullScreenshot(100))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(t.ArtifactDir(), name), picture, 0o644); err != nil {
			t.Fatal(err)
		}
		if len(picture) < 10_000 {
			t.Errorf("%s: %d bytes: nothing is drawn", name, len(picture))
		}
	}
	type seen struct {
		Pwned    bool     `json:"pwned"`
		Text     string   `json:"text"`
		Images   int      `json:"images"`
		Nameless []string `json:"nameless"`
		Lines    int      `json:"lines"`
		Scripts  int      `json:"scripts"`
		Focus    int      `json:"focus"`
		Lang     string   `json:"lang"`
		Live     int      `json:"live"`
	}
	do(chromedp.Navigate(f.url+"/"), chromedp.WaitVisible(chromedp.CSS("#flagged img")), chromedp.WaitVisible(chromedp.CSS("#incidents details")))
	if _, err := chromedp.Run(ctx, chromedp.Poll[bool](`[...document.images].every(i => i.complete && i.naturalWidth > 0)`)); err != nil {
		t.Fatal(err)
	}
	got, err := chromedp.Run(ctx, chromedp.Evaluate[seen](`({
		pwned: window.pwned !== undefined,
		text: document.body.innerText,
		images: document.images.length,
		nameless: [
			...[...document.images].filter(i => !i.alt).map(i => i.src),
			...[...document.querySelectorAll("main svg")].filter(s => !s.getAttribute("aria-label")).map(() => "chart"),
			...[...document.querySelectorAll("section")].filter(s => !document.getElementById(s.getAttribute("aria-labelledby"))).map(() => "section"),
		],
		lines: document.querySelectorAll("#chart-alarm path.line").length,
		scripts: document.scripts.length,
		focus: document.querySelectorAll("a[href], summary, [tabindex='0']").length,
		lang: document.documentElement.lang,
		live: document.querySelectorAll("[role=status], [role=alert]").length,
	})`))
	if err != nil {
		t.Fatal(err)
	}
	if got.Pwned || got.Scripts != 1 {
		t.Errorf("a text ran as a script: %+v", got)
	}
	for _, want := range []string{"defending", "attack", "<script>window.pwned=1</script>", "99.0%", "85.0% at 0.3", "alarm", "v2"} {
		if !strings.Contains(got.Text, want) {
			t.Errorf("the page does not show %q", want)
		}
	}
	if got.Images < 6 || got.Images%2 != 0 || got.Lines < 2 || len(got.Nameless) > 0 || got.Focus < 3 || got.Lang != "en" || got.Live != 2 {
		t.Errorf("%+v", got)
	}
	shot("light.png", "light")
	shot("dark.png", "dark")
	do(chromedp.EmulateViewport(390, 844))
	shot("narrow.png", "light")
	wide, err := chromedp.Run(ctx, chromedp.Evaluate[bool](`document.documentElement.scrollWidth > document.documentElement.clientWidth`))
	if err != nil || wide {
		t.Errorf("a narrow window scrolls sideways: %v, error %v", wide, err)
	}
	if _, err := chromedp.Run(ctx, chromedp.Evaluate[bool](`document.querySelector("#incidents details").open = false; document.querySelector("#incidents summary").focus(); true`)); err != nil {
		t.Fatal(err)
	}
	do(chromedp.KeyEvent("\r"))
	opened, err := chromedp.Run(ctx, chromedp.Evaluate[bool](`document.querySelector("#incidents details").open`))
	if err != nil || !opened {
		t.Errorf("an incident does not open by keyboard: error %v", err)
	}
}
