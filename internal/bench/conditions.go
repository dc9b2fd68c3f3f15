package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Conditions are what a figure is worth nothing without.
type conditions struct {
	Date       string  `json:"date"`
	CPU        string  `json:"cpu"`
	Cores      int     `json:"cores"`
	Memory     string  `json:"memory"`
	OS         string  `json:"os"`
	FileSystem string  `json:"file_system"`
	Syncs      float64 `json:"syncs_per_second"`
	Go         string  `json:"go"`
	Postgres   string  `json:"postgres,omitempty"`
	NATS       string  `json:"nats,omitempty"`
	Repeat     int     `json:"repeat"`
	Seconds    float64 `json:"seconds"`
	Warmup     float64 `json:"warmup_seconds"`
	Preload    int     `json:"preload"`
	Quick      bool    `json:"quick,omitempty"`
}

func observe(ctx context.Context, o options, dir string, s *server) (conditions, error) {
	c := conditions{
		Date: time.Now().Format(time.DateOnly), CPU: cpu(), Cores: runtime.NumCPU(), Memory: ram(),
		OS: system(), Go: runtime.Version(), Repeat: o.repeat, Seconds: o.duration.Seconds(), Warmup: o.warmup.Seconds(), Preload: o.preload, Quick: o.quick,
	}
	var err error
	if c.FileSystem, err = fileSystem(dir); err != nil {
		return c, err
	}
	if c.Syncs, err = syncRate(dir, time.Second); err != nil {
		return c, err
	}
	if s != nil {
		if c.Postgres, err = s.settings(ctx); err != nil {
			return c, fmt.Errorf("read the server's settings: %w", err)
		}
	}
	return c, nil
}

func (c conditions) lines() []string {
	var lines []string
	if c.Quick {
		lines = append(lines, "a quick run: it shows that everything works, not how fast it is")
	}
	lines = append(lines,
		fmt.Sprintf("%s; %s, %d cores, %s; %s; %s", c.Date, c.CPU, c.Cores, c.Memory, c.OS, c.Go),
		fmt.Sprintf("disk: %s, %s syncs a second (8 KiB written and fdatasync, one at a time, in a preallocated file)", c.FileSystem, short(c.Syncs)),
	)
	if c.Postgres != "" {
		lines = append(lines, "PostgreSQL "+c.Postgres+"; loopback TCP; server and clients share the cores")
	}
	if c.NATS != "" {
		lines = append(lines, c.NATS+"; servers and clients share the cores")
	}
	return append(lines,
		"every commit is durable when it is acknowledged, unless the column of guarantees says otherwise",
		fmt.Sprintf("events of 256 bytes of JSON, with id, stream, version, type, time and some 50 bytes of metadata; %s events stored where a row says so", short(float64(c.Preload))),
		fmt.Sprintf("each case ran %d times for %v s after %v s of warm-up, in turn with the others of its row, each in a process of its own on a fresh database", c.Repeat, c.Seconds, c.Warmup),
		"ratios are of medians; in brackets the lowest and the highest ratio within one turn",
	)
}

func cpu() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func ram() string {
	var info syscall.Sysinfo_t
	if err := syscall.Sysinfo(&info); err != nil {
		return "unknown memory"
	}
	return fmt.Sprintf("%.0f GiB", float64(info.Totalram)*float64(info.Unit)/(1<<30))
}

func system() string {
	text, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return runtime.GOOS
	}
	return "Linux " + strings.TrimSpace(string(text))
}

// fileSystem names what a folder is on, and refuses memory: a sync that does
// nothing would make every figure a lie.
func fileSystem(dir string) (string, error) {
	var info syscall.Statfs_t
	if err := syscall.Statfs(dir, &info); err != nil {
		return "", fmt.Errorf("look at the file system of %q: %w", dir, err)
	}
	switch uint32(info.Type) {
	case 0x01021994, 0x858458f6:
		return "", fmt.Errorf("%q is in memory, where nothing is durable: choose a folder on a disk with --dir", dir)
	case 0xef53:
		return "ext4", nil
	case 0x58465342:
		return "xfs", nil
	case 0x9123683e:
		return "btrfs", nil
	case 0x2fc12fc1:
		return "zfs", nil
	case 0x794c7630:
		return "overlayfs", nil
	}
	return fmt.Sprintf("file system %#x", uint32(info.Type)), nil
}

// syncRate measures how often a second a write reaches the disk.
func syncRate(dir string, d time.Duration) (float64, error) {
	f, err := os.CreateTemp(dir, "deed-bench-sync-")
	if err != nil {
		return 0, fmt.Errorf("measure syncs: %w", err)
	}
	defer os.Remove(filepath.Clean(f.Name()))
	defer f.Close()
	const size = 16 << 20
	if _, err := f.Write(make([]byte, size)); err != nil {
		return 0, fmt.Errorf("measure syncs: %w", err)
	}
	if err := f.Sync(); err != nil {
		return 0, fmt.Errorf("measure syncs: %w", err)
	}
	block := make([]byte, 8<<10)
	n := 0
	began := time.Now()
	for time.Since(began) < d {
		block[0]++
		if _, err := f.WriteAt(block, int64(n*len(block)%size)); err != nil {
			return 0, fmt.Errorf("measure syncs: %w", err)
		}
		if err := syscall.Fdatasync(int(f.Fd())); err != nil {
			return 0, fmt.Errorf("measure syncs: %w", err)
		}
		n++
	}
	return float64(n) / time.Since(began).Seconds(), nil
}
