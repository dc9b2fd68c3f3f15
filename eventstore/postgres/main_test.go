package postgres

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/deed-go/deed/internal/metatest"
	"github.com/deed-go/deed/internal/pgtest"
)

func TestMain(m *testing.M) {
	metatest.AtOnce("4")
	goleak.VerifyTestMain(pgtest.Main(m))
}
