package sagavet_test

import (
	"testing"

	"golang.org/x/tools/go/analysis/analysistest"

	"github.com/deed-go/deed/saga/sagavet"
)

func TestAnalyzer(t *testing.T) {
	t.Parallel()
	analysistest.Run(t, analysistest.TestData(), sagavet.Analyzer, "./shop/...")
}
