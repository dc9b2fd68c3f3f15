package esdbserver_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The official client for Node.js is another reading of the protocol than the
// one for Go, whose stubs the server is made of.
func TestNodeClient(t *testing.T) {
	if !strings.Contains(os.Getenv("DEED_TEST_REQUIRE"), "node") {
		t.Skip("the Node.js client is not asked for: put node into DEED_TEST_REQUIRE; it needs node and npm, and installs the client with npm")
	}
	dir := t.TempDir()
	for _, name := range []string{"package.json", "package-lock.json", "script.mjs"} {
		content, err := os.ReadFile(filepath.Join("node", name))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), content, 0o600))
	}
	run := func(ctx context.Context, name string, args ...string) {
		ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
		defer cancel()
		c := exec.CommandContext(ctx, name, args...)
		c.Dir = dir
		out, err := c.CombinedOutput()
		require.NoError(t, err, "%s %s:\n%s", name, strings.Join(args, " "), out)
		t.Logf("%s %s:\n%s", name, strings.Join(args, " "), out)
	}
	run(t.Context(), "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	if url := os.Getenv("DEED_TEST_ESDB_URL"); url != "" {
		run(t.Context(), "node", "script.mjs", url)
	}
	both(t, func(k *kit) { run(k.ctx, "node", "script.mjs", k.server.URL()) })
}
